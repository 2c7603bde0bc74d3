//! Disks that come and go, with a guest that has nothing but the registers.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nacre_proto::vmm::DeviceState;
use nacre_tests::backend::Backend;
use nacre_tests::control::Control;
use nacre_tests::machine::{Machine, Running};
use nacre_tests::process::Signal;

const BLK: u16 = 2;
const ROUNDS: usize = 50;

fn disk(dir: &Path) -> Result<Backend> {
    let image = dir.join("disk.img");
    fs::write(&image, vec![0; 1 << 20])?;
    Backend::start("nacre-blk", dir, &["--disk", &image.display().to_string()])
}

/// It runs, and answers.
fn machine(name: &str) -> Result<(Running, Control)> {
    let (mut control, theirs) = Control::new()?;
    let machine = Machine::bare(name)?.with(&["--log-level", "info"]);
    let mut running = machine.control(theirs).start()?;
    running.until("BEGIN")?;
    control.status()?;
    Ok((running, control))
}

fn descriptors(running: &mut Running) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", running.process().id()))?.count())
}

#[test]
fn a_disk_is_added_used_and_given_up_fifty_times_and_nothing_stays() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut backend = disk(dir.path())?;
    let (mut running, mut control) = machine(&format!("hotplug-disks rounds={ROUNDS}"))?;
    let before = descriptors(&mut running)?;
    for round in 0..ROUNDS {
        let address = control.add("disk", BLK, &backend.connect()?.into())?;
        ensure!(address == "0000:00:01.0", "{address} in round {round}");
        running.until(&format!("used {round}"))?;
        control.remove("disk")?;
        if round % 5 == 0 {
            let reason = control.kept("disk")?;
            ensure!(reason.contains("busy"), "{reason}");
            let [disk] = &control.status()?.devices[..] else { panic!("one device") };
            ensure!(!disk.leaving && disk.state == DeviceState::Active, "{disk:?}");
            control.remove("disk")?;
        }
        control.removed("disk")?;
        running.until(&format!("ejected {round}"))?;
        // The guest powers off after the last one.
        if round + 1 == ROUNDS {
            break;
        }
        ensure!(control.status()?.devices.is_empty());
        ensure!(descriptors(&mut running)? == before, "a descriptor stayed in round {round}");
        if round % 10 == 9 {
            backend = backend.replace(Signal::TERM)?;
        }
    }
    let ended = running.wait()?.passed("hotplug-disks")?;
    let gone: Vec<_> = ended.said.lines().filter(|line| line.contains("is gone")).collect();
    // Of the log under load some lines may be missing.
    ensure!(!gone.is_empty(), "{}", ended.said);
    ensure!(gone.iter().all(|line| line.contains(" 0 interrupt routes")), "{gone:?}");
    Ok(())
}

#[test]
fn a_guest_that_listens_late_is_told_of_what_came_before() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let backend = disk(dir.path())?;
    let (mut control, theirs) = Control::new()?;
    let machine = Machine::bare("hotplug-late")?.control(theirs).with_input();
    let mut running = machine.start()?;
    running.until("deaf")?;
    control.add("disk", BLK, &backend.connect()?.into())?;
    running.until("told")?;
    // Answered after the interrupt was raised, which the guest did not hear.
    control.status()?;
    let input = running.process().child().stdin.as_mut().context("the guest's serial port")?;
    input.write_all(b"x")?;
    running.wait()?.passed("hotplug-late")?;
    Ok(())
}

#[test]
fn what_can_not_be_added_or_removed_is_refused_with_its_reason() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let backend = disk(dir.path())?;
    let (mut running, mut control) = machine("spin")?;
    let before = descriptors(&mut running)?;
    let nobody = || -> Result<OwnedFd> { Ok(UnixStream::pair()?.0.into()) };
    let refused = |result: Result<String>| result.expect_err("it is refused").to_string();
    for (id, device_type, reason) in [("", 2, "1 to"), ("x", 0, "type"), ("x", 64, "type")] {
        let why = refused(control.add(id, device_type, &nobody()?));
        ensure!(why.contains(reason), "{why}");
    }
    let why = refused(control.add("x", BLK, &nobody()?));
    ensure!(why.contains("no backend"), "{why}");
    // One that hangs has ten seconds.
    let (silent, ours) = UnixStream::pair()?;
    let asked = Instant::now();
    let why = refused(control.add("x", BLK, &ours.into()));
    ensure!(why.contains("within 10000 ms"), "{why}");
    ensure!(asked.elapsed() < Duration::from_secs(20));
    drop(silent);
    ensure!(descriptors(&mut running)? == before && control.status()?.devices.is_empty());
    // The guest never looks.
    control.add("disk", BLK, &backend.connect()?.into())?;
    let why = refused(control.add("disk", BLK, &nobody()?));
    ensure!(why.contains("of this id"), "{why}");
    control.remove("disk")?;
    let why = control.remove("disk").expect_err("it is leaving").to_string();
    ensure!(why.contains("already"), "{why}");
    let [status] = &control.status()?.devices[..] else { panic!("one device") };
    ensure!(status.leaving && status.state == DeviceState::Idle, "{status:?}");
    let why = control.remove("other").expect_err("there is none").to_string();
    ensure!(why.contains("no such device"), "{why}");
    Ok(())
}
