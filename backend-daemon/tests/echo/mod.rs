//! A backend that is the test program itself: [`backend`] is run again in a child, where it serves
//! a device that echoes, unless the request says otherwise.
#![expect(clippy::panic, reason = "the device is asked to")]

use std::env;
use std::fs;
use std::io;
use std::process::{Command, ExitCode, abort, exit};

use backend_daemon::device::{
    Device, DeviceError, QueueIndex, Rings, Sources, StateError, Token, Worker,
};
use backend_daemon::process::{DaemonArgs, Policy, run};
use backend_daemon::testing::{Buffer, Daemon, Driver};
use clap::Parser as _;

const STATE_REPEATS: usize = 1 << 16;
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

    fn has_state(&self) -> bool {
        true
    }

    /// More than a pipe holds at once.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(self.config.repeat(STATE_REPEATS))
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.len() != self.config.len() * STATE_REPEATS {
            return Err("it is of another length".into());
        }
        let own = self.config.len();
        self.config.copy_from_slice(&state[..own]);
        Ok(())
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
            b"abort" => abort(),
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

const POLICY: Policy = Policy::of("echo");

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

pub(crate) fn start() -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "echo::backend", "--nocapture", "--test-threads=1"]);
    command.env(SOCKET, folder.path().join("vhost.sock"));
    Daemon::spawn(command, folder)
}

pub(crate) fn ask(driver: &mut Driver, request: &[u8]) -> Vec<u8> {
    let len = u32::try_from(request.len()).unwrap();
    driver.request(0, &[Buffer::Out(request), Buffer::In(len.max(8))])[..request.len()].to_vec()
}
