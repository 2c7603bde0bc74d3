//! Our VMM, and backends that none of us wrote, which are killed and started again.

use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::VmmExit;
use nacre_proto::vmm::{self, DeviceState, State};
use nacre_tests::artifacts;
use nacre_tests::control::Control;
use nacre_tests::machine::{Machine, Running};
use nacre_tests::process::{Process, Signal, until};
use tempfile::TempDir;

const KILLS: u32 = 20;
/// How long a guest takes to have something outstanding.
const AT_WORK: Duration = Duration::from_millis(500);

/// A backend as a command that is started again and again.
struct Foreign {
    dir: TempDir,
    command: fn(&Path, &Path) -> Result<Command>,
    process: Option<Process>,
}

impl Foreign {
    fn new(command: fn(&Path, &Path) -> Result<Command>) -> Result<Self> {
        Ok(Self { dir: tempfile::tempdir()?, command, process: None })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("backend.sock")
    }

    /// Starts a process in place of one that was killed, and connects to it.
    fn start(&mut self) -> Result<UnixStream> {
        let socket = self.socket();
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let mut command = (self.command)(self.dir.path(), &socket)?;
        let program = PathBuf::from(command.get_program());
        let process = Process::start(&program, command.stdout(Stdio::null()))?;
        self.process = Some(process);
        let mut connected = None;
        until("the backend's socket", || {
            connected = UnixStream::connect(&socket).ok();
            Ok(connected.is_some())
        })?;
        connected.context("a connection")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("no process")?.signal(signal)
    }

    fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.process.take().context("no process")?.wait()?;
        Ok(())
    }
}

fn storage_daemon(dir: &Path, socket: &Path) -> Result<Command> {
    let words = env::var("NACRE_QSD").context("NACRE_QSD: run `cargo xtask test interop`")?;
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().context("NACRE_QSD is empty")?);
    let disk = dir.join("disk.img");
    if !disk.exists() {
        fs::File::create(&disk)?.set_len(4 << 20)?;
    }
    let export = "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path=";
    command.args(words).arg("--blockdev");
    command.arg(format!("driver=file,node-name=d,filename={}", disk.display()));
    command.args(["--export", &format!("{export}{}", socket.display())]);
    Ok(command)
}

fn virtiofsd(dir: &Path, socket: &Path) -> Result<Command> {
    let share = dir.join("share");
    fs::create_dir_all(&share)?;
    let mut command = artifacts::virtiofsd()?;
    command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
    command.args(["--sandbox", "none"]);
    Ok(command)
}

/// What a share's frontend has to know by itself: its tag, and that it has one queue.
fn share_config() -> String {
    let tag: String = b"tag".iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{tag}{}01000000", "00".repeat(33))
}

fn start(
    scenario: &str,
    (id, kind): (&str, &str),
    backend: &mut Foreign,
) -> Result<(Running, Control)> {
    let (control, theirs) = Control::new()?;
    let machine = Machine::bare(scenario)?.with_input().control(theirs);
    let mut running = machine.device_at(id, kind, backend.start()?.into()).start()?;
    running.until("READY")?;
    Ok((running, control))
}

fn order(running: &mut Running, order: &str) -> Result<()> {
    let input = running.process().child().stdin.as_mut();
    Ok(input.context("the guest's serial port")?.write_all(order.as_bytes())?)
}

/// The device of this load is lost with requests outstanding: nobody takes its place, and the VM
/// goes on and says why.
fn is_refused(scenario: &str, device: (&str, &str), backend: &mut Foreign) -> Result<()> {
    let (running, mut control) = start(scenario, device, backend)?;
    let (id, _kind) = device;
    // Before the rings are its own, nothing of them has to be guessed.
    until("the backend serves the guest", || {
        Ok(control.status()?.devices[0].state == DeviceState::Active)
    })?;
    // Held, so that something is outstanding for sure.
    backend.signal(Signal::STOP)?;
    thread::sleep(AT_WORK);
    backend.kill()?;
    control.lost(id)?;
    for _try in 0..2 {
        let refused = control.reconnect(id, &backend.start()?.into());
        let reason = format!("{:#}", refused.err().context("the base was guessed")?);
        ensure!(reason.contains("requests outstanding"), "{reason}");
        let status = control.status()?;
        let device = &status.devices[0];
        ensure!((status.state, device.state) == (State::Running, DeviceState::Lost), "{status:?}");
        // Some end by themselves when they are refused.
        backend.kill().ok();
    }
    control.ask(vmm::Command::Stop, None)?;
    let ended = running.wait()?;
    ensure!(ended.ended(VmmExit::Stopped), "{ended:#?}");
    Ok(())
}

#[test]
fn a_storage_daemon_that_is_killed_with_nothing_outstanding_is_replaced() -> Result<()> {
    let mut backend = Foreign::new(storage_daemon)?;
    let (mut running, mut control) = start("blk-in-steps", ("disk0", "blk"), &mut backend)?;
    for _kill in 0..KILLS {
        running.until("step")?;
        backend.kill()?;
        control.lost("disk0")?;
        control.reconnect("disk0", &backend.start()?.into())?;
        order(&mut running, "n")?;
    }
    running.until("step")?;
    order(&mut running, "q")?;
    running.wait()?.passed("blk-in-steps")?;
    Ok(())
}

/// The daemon marks nothing either.
#[test]
fn a_storage_daemon_that_is_killed_with_requests_outstanding_is_not_resumed_on_a_guess()
-> Result<()> {
    is_refused("load-blk", ("disk0", "blk"), &mut Foreign::new(storage_daemon)?)
}

/// Debian's virtiofsd marks nothing, and it answers out of order: which requests are outstanding
/// can't be known. The guest's requests wait for ever then; the rest of the VM goes on.
#[test]
fn a_share_without_inflight_is_not_resumed_on_a_guess_and_the_vm_lives_on() -> Result<()> {
    let device = format!("fs,config={}", share_config());
    is_refused("load-fs", ("share", &device), &mut Foreign::new(virtiofsd)?)
}

#[test]
fn a_share_without_inflight_is_taken_again_if_nothing_was_outstanding() -> Result<()> {
    let mut backend = Foreign::new(virtiofsd)?;
    let device = format!("fs,config={}", share_config());
    let (mut running, mut control) = start("fs-twice", ("share", &device), &mut backend)?;
    backend.kill()?;
    control.lost("share")?;
    control.reconnect("share", &backend.start()?.into())?;
    order(&mut running, "q")?;
    running.wait()?.passed("fs-twice")?;
    Ok(())
}
