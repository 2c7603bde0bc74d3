#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]
//! The shim's program as containerd runs it: start, serve, delete, and what it tells of itself.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{ConnectRequest, DeleteResponse, ShutdownRequest},
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
    shim_async::TaskClient,
    ttrpc::{
        asynchronous::{Client, transport::Socket},
        context,
    },
    types::introspection::RuntimeInfo,
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(20);

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn bundle(&self, id: &str) -> PathBuf {
        let bundle = self.folder.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        bundle
    }

    /// Runs an action in the bundle of `id`.
    fn run(&self, id: &str, action: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_containerd-shim-nacre-v2"))
            .args(["-namespace", "tests", "-address", "/run/c.sock", "-publish-binary", "c"])
            .args(["-id", id])
            .args(action)
            .current_dir(self.bundle(id))
            .env("NACRE_STATE", self.folder.path().join("nacre"))
            .env_remove("TTRPC_ADDRESS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    /// `start`, by the protocol that can say where the sockets are to be.
    fn start(&self, id: &str) -> Output {
        let mut params = BootstrapParams::new();
        params.set_instance_id(id.to_owned());
        params.set_namespace("tests".to_owned());
        params.set_socket_dir(self.folder.path().join("s").display().to_string());
        self.run(id, &["start"], &params.write_to_bytes().unwrap())
    }

    fn pid(&self, id: &str) -> Pid {
        let text = fs::read_to_string(self.bundle(id).join("shim.pid")).unwrap();
        Pid::from_raw(text.parse().unwrap()).unwrap()
    }
}

fn address(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "containerd reads it as part of the reply");
    let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    result.address
}

async fn client(address: &str) -> TaskClient {
    let path = Path::new(address.strip_prefix("unix://").unwrap());
    TaskClient::new(Client::new(Socket::from(UnixStream::connect(path).await.unwrap())))
}

fn limit() -> context::Context {
    context::with_timeout(i64::try_from(PATIENCE.as_nanos()).unwrap())
}

/// Waits until a process is gone, or a zombie that its new parent has not looked at.
fn gone(pid: Pid) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        if test_kill_process(pid).is_err() || stat.is_ok_and(|stat| stat.contains(") Z ")) {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

#[tokio::test]
async fn a_sandbox_has_one_shim_which_its_containers_find() {
    let place = Place::new();
    let sandbox = address(&place.start("pod"));
    assert_eq!(fs::read_to_string(place.bundle("pod").join("address")).unwrap(), sandbox);
    let pid = place.pid("pod");
    assert_eq!(address(&place.start("pod")), sandbox, "a second start finds the first shim");
    assert_eq!(place.pid("pod"), pid);

    let config = r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
    fs::write(place.bundle("web").join("config.json"), config).unwrap();
    assert_eq!(address(&place.start("web")), sandbox);
    assert_eq!(fs::read_to_string(place.bundle("web").join("address")).unwrap(), sandbox);
    let orphan = r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-id":"x"}}"#;
    fs::write(place.bundle("orphan").join("config.json"), orphan).unwrap();
    let refused = place.start("orphan");
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("sandbox `x` does not run"));

    // The end of a container of the pod is no end of its shim.
    delete(&place, "web");
    let task = client(&sandbox).await;
    let connected = task.connect(limit(), &ConnectRequest::new()).await.unwrap();
    assert_eq!(connected.shim_pid, pid.as_raw_nonzero().get().unsigned_abs());
    let session = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap();
    let fields: Vec<&str> = session.rsplit_once(") ").unwrap().1.split(' ').collect();
    let own = pid.as_raw_nonzero().to_string();
    assert_eq!(fields[2..4], [own.as_str(), own.as_str()], "its own group and session");

    task.shutdown(limit(), &ShutdownRequest::new()).await.unwrap();
    assert!(gone(pid));
    assert!(!Path::new(sandbox.strip_prefix("unix://").unwrap()).exists());
}

fn delete(place: &Place, id: &str) {
    let begun = Instant::now();
    let output =
        place.run(id, &["-bundle", &place.bundle(id).display().to_string(), "delete"], b"");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty());
    let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.seconds > 0);
    assert!(begun.elapsed() < Duration::from_secs(5), "containerd gives it no more");
}

#[tokio::test]
async fn deleting_ends_a_shim_and_can_be_repeated() {
    let place = Place::new();
    let address = address(&place.start("pod"));
    delete(&place, "pod");
    assert!(gone(place.pid("pod")));
    assert!(!Path::new(address.strip_prefix("unix://").unwrap()).exists());
    delete(&place, "pod");
    delete(&place, "never-there");
}

#[tokio::test]
async fn a_shim_that_was_killed_is_replaced_at_the_same_place() {
    let place = Place::new();
    let first = address(&place.start("pod"));
    let pid = place.pid("pod");
    kill_process(pid, Signal::KILL).unwrap();
    assert!(gone(pid));
    assert_eq!(address(&place.start("pod")), first);
    let pid = place.pid("pod");
    // Once it serves, it is told.
    client(&first).await.connect(limit(), &ConnectRequest::new()).await.unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert!(gone(pid), "it ends when it is told to");
    assert!(!Path::new(first.strip_prefix("unix://").unwrap()).exists());
}

#[test]
fn it_tells_what_it_is() {
    let place = Place::new();
    let info = place.run("x", &["-info"], b"");
    let info = RuntimeInfo::parse_from_bytes(&info.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.nacre.v2");
    let version = place.run("x", &["-v"], b"");
    assert!(String::from_utf8_lossy(&version.stdout).contains(env!("CARGO_PKG_VERSION")));
    let wrong = place.run("x", &["dance"], b"");
    assert!(!wrong.status.success() && wrong.stdout.is_empty());
}
