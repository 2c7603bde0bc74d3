//! Backends that are killed, and replaced in peace, under load: the guest notices nothing.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_proto::vmm::{Command, DeviceState, DeviceStatus, Outcome};
use nacre_tests::backend::Backend;
use nacre_tests::control::Control;
use nacre_tests::machine::Machine;
use nacre_tests::packet::{self, PacketSocket};
use nacre_tests::process::{PATIENCE, Signal};

use crate::net::{GUEST_MAC, HOST_MAC};

const DISK_BYTES: u64 = 4 << 20;
/// How many requests the guest makes between two of its lines.
const LINE_EVERY: u64 = 500;

/// How a backend makes way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Killed,
    Quiesced,
}

fn disk(dir: &Path) -> Result<Backend> {
    let path = dir.join("disk.img");
    File::create(&path)?.set_len(DISK_BYTES)?;
    let disk = path.display().to_string();
    Backend::start("nacre-blk", dir, &["--disk", &disk, "--lock-wait", "60"])
}

fn replace(device: &str, backend: Backend, control: &mut Control, way: Way) -> Result<Backend> {
    let backend = match way {
        Way::Killed => {
            let backend = backend.replace(Signal::KILL)?;
            control.lost(device)?;
            backend
        }
        Way::Quiesced => {
            let command = Command::Quiesce { device: device.to_owned() };
            let outcome = control.ask(command, None)?;
            ensure!(outcome == Outcome::Done, "{outcome:?}");
            backend.replace(Signal::TERM)?
        }
    };
    control.reconnect(device, &backend.connect()?.into())?;
    Ok(backend)
}

/// Replaces the disk's backend at each of the guest's lines; `ways` says how, again and again.
fn disk_survives(rounds: u64, ways: &[Way]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut backend = disk(dir.path())?;
    let requests = format!("blk-storm requests={}", (rounds + 1) * LINE_EVERY);
    let machine = Machine::bare(&requests)?.device("disk0", "blk", backend.socket());
    let (mut control, theirs) = Control::new()?;
    let mut running = machine.control(theirs).start()?;
    for way in ways.iter().cycle().take(usize::try_from(rounds)?) {
        running.until("requests=")?;
        backend = replace("disk0", backend, &mut control, *way)?;
    }
    let status = DeviceStatus {
        id: "disk0".to_owned(),
        address: "0000:00:01.0".to_owned(),
        state: DeviceState::Active,
        leaving: false,
        reconnects: rounds,
    };
    ensure!(control.status()?.devices == [status]);
    let ended = running.wait()?.passed("blk-storm")?;
    let answered: u64 = ended.value("answered")?.parse()?;
    ensure!(answered >= (rounds + 1) * LINE_EVERY, "{answered} requests");
    Ok(())
}

#[test]
fn a_disk_that_is_killed_again_and_again_under_load_loses_and_repeats_nothing() -> Result<()> {
    disk_survives(50, &[Way::Killed])
}

#[test]
fn a_disk_is_replaced_in_peace_under_load() -> Result<()> {
    disk_survives(25, &[Way::Quiesced])
}

#[test]
fn a_disk_may_be_killed_and_replaced_in_peace_in_turn() -> Result<()> {
    disk_survives(24, &[Way::Killed, Way::Quiesced, Way::Quiesced, Way::Killed])
}

/// A process that hangs may still write to the guest's memory, so that a machine that is reset has
/// to wait for its end.
#[test]
fn a_machine_reset_waits_for_the_end_of_a_backend_that_hangs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut backend = disk(dir.path())?;
    let machine = Machine::bare("blk-reboot-later")?.device("disk0", "blk", backend.socket());
    let (mut control, theirs) = Control::new()?;
    let mut running = machine.control(theirs).with_input().start()?;
    running.until("resetting")?;
    backend.process().signal(Signal::STOP)?;
    let input = running.process().child().stdin.as_mut();
    input.context("the guest's serial port")?.write_all(b"now")?;
    let reason = control.lost("disk0")?;
    ensure!(reason.contains("did not stop"), "{reason}");
    let status = control.status()?;
    ensure!(
        status.resets == 0,
        "the guest runs while its former memory may be written: {status:?}"
    );
    let backend = backend.replace(Signal::KILL)?;
    control.reconnect("disk0", &backend.connect()?.into())?;
    ensure!(control.status()?.resets == 1);
    let ended = running.wait()?.passed("blk-reboot-later")?;
    ensure!(ended.guest.iter().any(|line| line == "second boot"), "{ended:?}");
    Ok(())
}

#[test]
fn a_nic_that_is_killed_and_replaced_again_and_again_goes_on_carrying_frames() -> Result<()> {
    // A thread has a network namespace of its own; its children are born into it.
    thread::spawn(nic_in_own_namespace).join().expect("the test does not panic")
}

fn nic_in_own_namespace() -> Result<()> {
    const ROUNDS: u32 = 30;
    const FRAMES: u32 = 20;
    packet::own_namespace()?;
    let made = process::Command::new("ip")
        .args(["tuntap", "add", "t0", "mode", "tap", "vnet_hdr"])
        .status();
    ensure!(made.context("the ip command")?.success(), "cannot make a tap");
    ensure!(process::Command::new("ip").args(["link", "set", "t0", "up"]).status()?.success());
    let dir = tempfile::tempdir()?;
    let args = ["--tap", "t0", "--mac", "02:00:00:00:00:07"];
    let mut backend = Backend::start("nacre-net", dir.path(), &args)?;
    let machine = Machine::bare("net")?.device("net0", "net", backend.socket());
    let (mut control, theirs) = Control::new()?;
    let mut running = machine.control(theirs).start()?;
    running.until("READY")?;
    let socket = PacketSocket::on("t0")?;
    for round in 0..ROUNDS {
        for frame in 0..FRAMES {
            ping(&socket, round * FRAMES + frame)?;
        }
        // On their way while the backend goes, so that it has something in hand.
        for _ in 0..8 {
            socket.send(&frame(u32::MAX))?;
        }
        let way = if round % 3 == 2 { Way::Quiesced } else { Way::Killed };
        backend = replace("net0", backend, &mut control, way)?;
    }
    ping(&socket, ROUNDS * FRAMES)?;
    ensure!(control.status()?.devices[0].reconnects == u64::from(ROUNDS));
    socket.send(&[&GUEST_MAC[..], &HOST_MAC, &ETHER_TYPE, b"stop", &[0; 46]].concat())?;
    let ended = running.wait()?.passed("net")?;
    let echoed: u32 = ended.value("echoed")?.parse()?;
    ensure!(echoed > ROUNDS * FRAMES, "{echoed} frames");
    Ok(())
}

const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

fn frame(number: u32) -> Vec<u8> {
    [&GUEST_MAC[..], &HOST_MAC, &ETHER_TYPE, &number.to_le_bytes(), &[0xa5; 100]].concat()
}

/// Sends a frame until it comes back: a wire may lose some.
fn ping(socket: &PacketSocket, number: u32) -> Result<()> {
    const AGAIN_AFTER: Duration = Duration::from_millis(200);
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        socket.send(&frame(number))?;
        let again = Instant::now() + AGAIN_AFTER;
        while let Some(left) = again.checked_duration_since(Instant::now()) {
            let Ok(answer) = socket.receive(left) else { break };
            let is_echo = answer.len() > 18 && answer[6..12] == GUEST_MAC;
            if is_echo && answer[14..] == frame(number)[14..] {
                return Ok(());
            }
        }
    }
    bail!("frame {number} did not come back within {PATIENCE:?}")
}

#[test]
fn a_request_that_makes_no_sense_is_refused_and_changes_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let backend = disk(dir.path())?;
    let machine = Machine::bare("spin")?.device("disk0", "blk", backend.socket());
    let (mut control, theirs) = Control::new()?;
    let _running = machine.control(theirs).start()?;
    let unwanted = UnixStream::pair()?.0.into();
    let device = || "disk0".to_owned();
    let nobody = || "disk1".to_owned();
    for (command, descriptor, reason) in [
        (Command::Reconnect { device: device() }, Some(&unwanted), "has a backend"),
        (Command::Reconnect { device: device() }, None, "0 descriptors"),
        (Command::Reconnect { device: nobody() }, Some(&unwanted), "no such device"),
        (Command::Quiesce { device: nobody() }, None, "no such device"),
        (Command::Status, Some(&unwanted), "1 descriptors"),
    ] {
        let said = format!("{command:?}");
        let Outcome::Refused(why) = control.ask(command, descriptor)? else { bail!("{said}") };
        ensure!(why.contains(reason), "{said}: {why}");
    }
    let [disk] = &control.status()?.devices[..] else { bail!("one device") };
    ensure!((disk.state, disk.reconnects) == (DeviceState::Idle, 0), "{disk:?}");
    Ok(())
}
