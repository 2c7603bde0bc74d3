//! What becomes of a backend whose device fails: it ends and says how, and never hangs silently.
//!
//! The backend is this very program: [`backend`] is run again in a child, where it serves a
//! device that echoes, unless the request says otherwise.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::env;
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitCode, exit};
use std::time::Duration;

use backend_daemon::device::{Device, DeviceError, QueueIndex, Rings, Sources, Token, Worker};
use backend_daemon::process::{DaemonArgs, Policy, run};
use backend_daemon::testing::{Buffer, Daemon, Driver, Options};
use clap::Parser as _;
use nacre_proto::exit::BackendExit;

const SOCKET: &str = "NACRE_TEST_SOCKET";

#[derive(clap::Parser)]
struct Args {
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Gives each request back as it came. Its configuration space is what was last written there.
struct Echo {
    config: Vec<u8>,
}

impl Device for Echo {
    type Worker = EchoWorker;

    fn device_id(&self) -> u32 {
        42
    }

    fn queue_count(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        64
    }

    fn features(&self) -> u64 {
        1
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn write_config(&mut self, offset: u32, bytes: &[u8]) {
        let offset = offset as usize;
        self.config[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn groups(&self) -> Vec<Vec<QueueIndex>> {
        vec![vec![QueueIndex(0), QueueIndex(1)]]
    }

    fn worker(&mut self, _group: usize) -> Result<EchoWorker, DeviceError> {
        Ok(EchoWorker { features: 0 })
    }
}

struct EchoWorker {
    features: u64,
}

impl EchoWorker {
    fn serve(&self, request: &[u8]) -> Result<Vec<u8>, DeviceError> {
        match request {
            b"host" => Err(DeviceError::Host {
                what: "cannot go on",
                source: io::Error::other("as was asked"),
            }),
            b"panic" => panic!("as was asked"),
            b"open" => Ok(fs::read("/etc/hostname").unwrap_or_default()),
            b"features" => Ok(self.features.to_le_bytes().to_vec()),
            other => Ok(other.to_vec()),
        }
    }
}

impl Worker for EchoWorker {
    fn negotiated(&mut self, features: u64) {
        self.features = features;
    }

    fn sources(&mut self, _sources: &mut dyn Sources) -> Result<(), DeviceError> {
        Ok(())
    }

    fn kicked(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let Some(ring) = rings.ring(queue) else { return Ok(()) };
        while let Some(chain) = ring.pop()? {
            let mut request = vec![0; usize::try_from(chain.readable_len()).unwrap()];
            chain.read_at(0, &mut request)?;
            let answer = self.serve(&request)?;
            chain.write_at(0, &answer)?;
            ring.push(chain, u32::try_from(answer.len()).unwrap())?;
        }
        Ok(())
    }

    fn ready(&mut self, _token: Token, _rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn drain(&mut self, _queue: QueueIndex, _rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
}

const POLICY: Policy =
    Policy { device_type: "echo", features: &[], worker_syscalls: &[], keep_capabilities: &[] };

/// No test by itself: what the others start.
#[test]
#[expect(clippy::exit, reason = "the child's exit code is the daemon's, not the test harness's")]
fn backend() {
    let Some(socket) = env::var_os(SOCKET) else { return };
    let args = Args::parse_from(["echo".as_ref(), "--socket-path".as_ref(), socket.as_os_str()]);
    let code = run("echo", &args.daemon, &POLICY, || Ok(Echo { config: vec![0; 8] }));
    let number = (0..=u8::MAX).find(|number| ExitCode::from(*number) == code).unwrap();
    exit(number.into());
}

fn start() -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "backend", "--nocapture", "--test-threads=1"]);
    command.env(SOCKET, folder.path().join("vhost.sock"));
    Daemon::spawn(command, folder)
}

fn ask(driver: &mut Driver, request: &[u8]) -> Vec<u8> {
    let len = u32::try_from(request.len()).unwrap();
    driver.request(0, &[Buffer::Out(request), Buffer::In(len.max(8))])[..request.len()].to_vec()
}

#[test]
fn a_host_failure_ends_the_process_with_its_own_code() {
    let mut daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(ask(&mut driver, b"hello"), b"hello");
    driver.submit(0, &[Buffer::Out(b"host"), Buffer::In(8)]);
    let code = u8::from(BackendExit::WorkerDied);
    assert_eq!(daemon.wait().code(), Some(code.into()), "{}", daemon.log());
    assert!(daemon.log().contains("cannot go on: as was asked"), "{}", daemon.log());
    assert!(!daemon.socket().exists());
}

#[test]
fn a_panic_ends_the_process_with_its_own_code() {
    let mut daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.submit(0, &[Buffer::Out(b"panic"), Buffer::In(8)]);
    let code = u8::from(BackendExit::WorkerDied);
    assert_eq!(daemon.wait().code(), Some(code.into()), "{}", daemon.log());
    assert!(daemon.log().contains("as was asked"), "{}", daemon.log());
}

#[test]
fn opening_a_file_ends_the_process_at_once() {
    let mut daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.submit(0, &[Buffer::Out(b"open"), Buffer::In(8)]);
    assert_eq!(daemon.wait().signal(), Some(31), "SIGSYS expected; {}", daemon.log());
}

#[test]
fn an_answer_that_does_not_fit_stops_the_queue_and_no_other() {
    let mut daemon = start();
    let options = Options { queues: 2, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let request = driver.submit(0, &[Buffer::Out(b"too long"), Buffer::In(2)]);
    assert!(driver.wait_for_error(0));
    assert_eq!(driver.request(1, &[Buffer::Out(b"fine"), Buffer::In(4)]), b"fine");
    assert_eq!(driver.wait_for(0, request, Duration::from_millis(50)), None);
    driver.reset();
    assert_eq!(ask(&mut driver, b"again"), b"again");
    assert!(daemon.is_running());
}

#[test]
fn the_configuration_is_written_within_its_bounds_only() {
    let daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert!(driver.write_config(2, b"abc"));
    assert_eq!(driver.config(0, 8), b"\0\0abc\0\0\0");
    assert_eq!(driver.config(4, 8), b"c\0\0\0\0\0\0\0", "zeroes behind the end");
    assert!(!driver.write_config(6, b"abc"));
    let mut next = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(next.config(0, 8), b"\0\0abc\0\0\0");
}

#[test]
fn the_worker_learns_what_was_negotiated() {
    let daemon = start();
    let options = Options { event_idx: false, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let bytes = driver.request(0, &[Buffer::Out(b"features"), Buffer::In(8)]);
    assert_eq!(bytes, driver.features().to_le_bytes());
    assert_eq!(driver.features() & 1 << 29, 0);
}
