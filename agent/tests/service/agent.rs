//! A running agent in namespaces of its own, and what a host does with it.

use std::{
    fs::{self, File},
    future::Future,
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nacre_proto::{
    agent::{
        CreateContainerRequest, ExecRequest, ProcessRequest, ResizeTerminalRequest,
        ShutdownRequest, SignalRequest, WaitResponse,
    },
    agent_ttrpc::AgentClient,
    stream::{Hello, Stream},
};
use rustix::process::getuid;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    runtime::Runtime,
    time::{sleep, timeout},
};
use ttrpc::{Code, context::with_timeout};

/// No step of a test takes this long on a machine that is not stuck.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
const BUSYBOX: &str = "/bin/busybox";

/// Runs a test against an agent of its own; every test has a deadline.
pub(crate) fn with_agent<F, T>(test: T)
where
    F: Future<Output = ()>,
    T: FnOnce(Agent) -> F,
{
    if let Some(reason) = unfit() {
        println!("SKIPPED: {reason}");
        return;
    }
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let agent = Agent::boot().await;
        timeout(LIMIT, test(agent)).await.expect("the test took too long");
    });
}

fn unfit() -> Option<String> {
    if !getuid().is_root() {
        return Some("containers need root".to_owned());
    }
    if !Path::new(BUSYBOX).exists() {
        return Some(format!("no {BUSYBOX}: install busybox-static"));
    }
    if cgroup2().is_none() {
        return Some("no cgroup2 file system is mounted".to_owned());
    }
    None
}

/// Where the machine has its control groups, version 2.
fn cgroup2() -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = table.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// An agent; its processes, folders and control groups go when it is dropped.
pub(crate) struct Agent {
    pub(crate) client: AgentClient,
    folder: TempDir,
    process: Child,
    cgroup: PathBuf,
}

impl Agent {
    async fn boot() -> Self {
        let folder = tempfile::tempdir().unwrap();
        make_root(&folder.path().join("root"));
        let name = folder.path().file_name().unwrap().to_string_lossy().into_owned();
        let top = cgroup2().unwrap();
        hand_controllers_on(&top);
        let cgroup = top.join(format!("nacre-test{name}"));
        fs::create_dir(&cgroup).unwrap();
        // The shell moves itself, so that the agent's cgroup namespace begins in the new group,
        // which nothing else is in.
        let script = "echo 0 > \"$1/cgroup.procs\" && exec \"$2\" --listen-unix \"$3\"";
        let mut process = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"])
            .args([&cgroup, Path::new(env!("CARGO_BIN_EXE_nacre-agent")), folder.path()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let client = connect(folder.path(), &mut process).await;
        Self { client, folder, process, cgroup }
    }

    /// What the agent has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The container's root, as the machine sees it.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Runs a command of the machine in the agent's namespaces.
    pub(crate) fn inside(&self, args: &[&str]) -> String {
        let output = Command::new("nsenter")
            .args(["-t", &self.pid().to_string(), "-m", "-u", "-i", "-n", "-p"])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The agent's number on this machine: the child of `unshare`.
    fn pid(&self) -> u32 {
        let id = self.process.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        children.trim().parse().unwrap()
    }

    /// A specification that runs `args` on the busybox root.
    pub(crate) fn spec(&self, args: &[&str]) -> Value {
        let capabilities = json!(["CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"]);
        json!({
            "ociVersion": "1.0.2",
            "root": { "path": self.root(), "readonly": false },
            "hostname": "box",
            "process": {
                "args": args,
                "cwd": "/",
                "env": ["PATH=/bin", "MARK=of-the-container"],
                "user": { "uid": 0, "gid": 0 },
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                }
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] }
            ],
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "network" }
            ] }
        })
    }

    pub(crate) async fn create_with(&self, request: CreateContainerRequest) -> Result<u32, Status> {
        Ok(self.client.create_container(context(), &request).await.map_err(status)?.pid)
    }

    /// Makes a container without terminal that runs `args`.
    pub(crate) async fn create(&self, id: &str, args: &[&str]) {
        let request = request(id, &self.spec(args));
        assert!(self.create_with(request).await.unwrap() > 0);
    }

    pub(crate) async fn start(&self, id: &str, exec: &str) -> Result<u32, Status> {
        Ok(self.client.start(context(), &process(id, exec)).await.map_err(status)?.pid)
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> WaitResponse {
        self.client.wait(context(), &process(id, exec)).await.unwrap()
    }

    pub(crate) async fn delete(&self, id: &str, exec: &str) -> Result<(), Status> {
        self.client.delete(context(), &process(id, exec)).await.map(drop).map_err(status)
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        exec: &str,
        signal: i32,
        all: bool,
    ) -> Result<(), Status> {
        let request = SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal: u32::try_from(signal).unwrap(),
            all,
            ..SignalRequest::new()
        };
        self.client.signal(context(), &request).await.map(drop).map_err(status)
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec: &str,
        oci: &Value,
        terminal: bool,
    ) -> Result<(), Status> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            oci_process: oci.to_string().into_bytes(),
            terminal,
            stdin: true,
            ..ExecRequest::new()
        };
        self.client.exec(context(), &request).await.map(drop).map_err(status)
    }

    pub(crate) async fn resize(
        &self,
        id: &str,
        exec: &str,
        columns: u32,
        rows: u32,
    ) -> Result<(), Status> {
        let request = ResizeTerminalRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            columns,
            rows,
            ..ResizeTerminalRequest::new()
        };
        self.client.resize_terminal(context(), &request).await.map(drop).map_err(status)
    }

    pub(crate) async fn shutdown(&self) -> Result<(), Status> {
        self.client.shutdown(context(), &ShutdownRequest::new()).await.map(drop).map_err(status)
    }

    /// Waits until the agent's process is gone and tells whether it ended well.
    pub(crate) async fn gone(&mut self) -> bool {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < deadline, "the agent goes on");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Connects to a port of the agent's.
    pub(crate) async fn connection(&self, port: u32) -> UnixStream {
        UnixStream::connect(self.folder.path().join(port.to_string())).await.unwrap()
    }

    /// Connects one stream of a process.
    pub(crate) async fn stream(
        &self,
        id: &str,
        exec: &str,
        stream: Stream,
        offset: u64,
    ) -> UnixStream {
        let mut connection = self.connection(nacre_proto::STREAM_PORT).await;
        let hello = Hello { container_id: id.to_owned(), exec_id: exec.to_owned(), stream, offset };
        connection.write_all(&hello.encode().unwrap()).await.unwrap();
        connection
    }

    /// All that a process writes to one stream, to its end.
    pub(crate) async fn all_of(&self, id: &str, exec: &str, stream: Stream) -> Vec<u8> {
        let mut connection = self.stream(id, exec, stream, 0).await;
        let mut bytes = Vec::new();
        timeout(LIMIT, connection.read_to_end(&mut bytes)).await.unwrap().unwrap();
        bytes
    }

    /// Runs a container to its end: what it printed, and how it ended.
    pub(crate) async fn run(&self, id: &str, spec: &Value) -> (String, WaitResponse) {
        self.create_with(request(id, spec)).await.unwrap();
        self.start(id, "").await.unwrap();
        let stdout = self.all_of(id, "", Stream::Stdout).await;
        let exit = self.wait(id, "").await;
        self.delete(id, "").await.unwrap();
        (String::from_utf8(stdout).unwrap(), exit)
    }

    /// Asserts that nothing of a container is left inside the agent's namespaces.
    pub(crate) fn assert_no_trace(&self, id: &str) {
        let found = self.inside(&["find", "/run/nacre", "/sys/fs/cgroup/nacre", "-name", id]);
        assert_eq!(found, "");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let log = self.log();
        if !log.is_empty() && std::thread::panicking() {
            println!("the agent's log:\n{log}");
        }
        // Ends the agent and all that runs under it (`--kill-child`).
        drop(self.process.kill());
        drop(self.process.wait());
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.cgroup.exists() && remove_groups(&self.cgroup).is_err() {
            if Instant::now() > deadline {
                println!("{} is left behind", self.cgroup.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The status that a call failed with.
pub(crate) type Status = (Code, String);

pub(crate) fn status(error: ttrpc::Error) -> Status {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

pub(crate) fn context() -> ttrpc::context::Context {
    with_timeout(i64::try_from(LIMIT.as_nanos()).unwrap())
}

pub(crate) fn process(id: &str, exec: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..ProcessRequest::new()
    }
}

/// A request for a container with an input and without a terminal.
pub(crate) fn request(id: &str, spec: &Value) -> CreateContainerRequest {
    CreateContainerRequest {
        container_id: id.to_owned(),
        oci_spec: spec.to_string().into_bytes(),
        stdin: true,
        ..CreateContainerRequest::new()
    }
}

async fn connect(folder: &Path, process: &mut Child) -> AgentClient {
    let address = format!("unix://{}/{}", folder.display(), nacre_proto::AGENT_PORT);
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Ok(client) = ttrpc::r#async::Client::connect(&address).await {
            return AgentClient::new(client);
        }
        let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
        assert!(process.try_wait().unwrap().is_none(), "the agent ended: {log}");
        assert!(Instant::now() < deadline, "no agent: {log}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn make_root(root: &Path) {
    for folder in ["bin", "dev", "proc", "etc", "tmp"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "head", "sleep", "stty", "id", "env", "tr", "pwd", "ps", "hostname",
        "mkdir", "kill", "rm", "test", "true", "ls", "grep", "dd",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("bin/not-executable"), "x").unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
}

/// Opens the controllers that there are to test groups; without root's consent there are none.
fn hand_controllers_on(top: &Path) {
    let list = fs::read_to_string(top.join("cgroup.controllers")).unwrap_or_default();
    for controller in list.split_whitespace() {
        drop(fs::write(top.join("cgroup.subtree_control"), format!("+{controller}")));
    }
}

fn remove_groups(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)?.flatten() {
        if entry.path().is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
