//! RAM that comes and goes, and backends that have to know it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::VmmExit;
use nacre_proto::vmm::{Command, DeviceState, Outcome};
use nacre_tests::backend::Backend;
use nacre_tests::control::Control;
use nacre_tests::machine::{Machine, Running};
use nacre_tests::process::{Signal, until};

const NAME: &str = "memory-hotplug";
const BOOT: u64 = 64 << 20;
const UNIT: u64 = 128 << 20;
/// The most units of these machines.
const UNITS: u64 = 12;
const EJECT: &[u8] = b"e";
const KEEP: &[u8] = b"k";

/// A machine with a disk.
struct Vm {
    control: Control,
    running: Running,
    disk: Backend,
    _dir: tempfile::TempDir,
}

fn bytes(units: u64) -> u64 {
    BOOT + units * UNIT
}

fn disk(dir: &Path) -> Result<Backend> {
    let path = dir.join("disk.img");
    File::create(&path)?.set_len(16 << 20)?;
    let disk = path.display().to_string();
    Backend::start("nacre-blk", dir, &["--disk", &disk, "--lock-wait", "60"])
}

impl Vm {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let disk = disk(dir.path())?;
        let (control, theirs) = Control::new()?;
        let running = Machine::bare(NAME)?
            .with(&["--max-memory", &bytes(UNITS).to_string()])
            .device("disk0", "blk", disk.socket())
            .control(theirs)
            .with_input()
            .start()?;
        let mut vm = Self { control, running, disk, _dir: dir };
        vm.says("found 0")?;
        Ok(vm)
    }

    fn says(&mut self, line: &str) -> Result<()> {
        self.running.until(line).map(drop)
    }

    fn order(&mut self, order: &[u8]) -> Result<()> {
        let input = self.running.process().child().stdin.as_mut();
        Ok(input.context("the guest's serial port")?.write_all(order)?)
    }

    fn set(&mut self, units: u64) -> Result<()> {
        self.control.set_memory(bytes(units))
    }

    /// What the VMM says it has.
    fn has(&mut self, units: u64) -> Result<()> {
        let has = self.control.status()?.memory_bytes;
        ensure!(has == bytes(units), "{has} bytes instead of {units} units");
        Ok(())
    }

    /// More RAM, which the guest finds, fills and gives to the disk.
    fn grow(&mut self, from: u64, to: u64) -> Result<()> {
        self.set(to)?;
        (from..to).try_for_each(|unit| self.says(&format!("came {unit}")))?;
        self.has(to)
    }

    /// The guest ejects the next unit that it is asked for, and has seen that it is gone.
    fn ejects(&mut self, unit: u64) -> Result<()> {
        self.says(&format!("asked {unit}"))?;
        self.order(EJECT)?;
        self.says(&format!("ejected {unit}"))
    }

    /// Has the disk's process stand still: a thread of it may go on for a moment after the signal.
    fn stop_disk(&mut self) -> Result<()> {
        self.disk.process().signal(Signal::STOP)?;
        let tasks = format!("/proc/{}/task", self.disk.process().id());
        until("the disk stands still", || {
            let stands = |task: &fs::DirEntry| {
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
            };
            Ok(fs::read_dir(&tasks)?.filter_map(Result::ok).all(|task| stands(&task)))
        })
    }

    fn refused(&mut self, bytes: u64, why: &str) -> Result<()> {
        match self.control.ask(Command::SetMemory { bytes }, None)? {
            Outcome::Refused(reason) if reason.contains(why) => Ok(()),
            other => anyhow::bail!("not refused by {why:?}: {other:?}"),
        }
    }

    fn kill_disk(self) -> Result<Self> {
        let Self { mut control, running, disk, _dir } = self;
        let disk = disk.replace(Signal::KILL)?;
        control.lost("disk0")?;
        Ok(Self { control, running, disk, _dir })
    }

    fn reconnect(&mut self) -> Result<()> {
        self.control.reconnect("disk0", &self.disk.connect()?.into())
    }

    fn disk_is(&mut self, state: DeviceState) -> Result<()> {
        let is = self.control.status()?.devices[0].state;
        ensure!(is == state, "the disk is {is:?}");
        Ok(())
    }

    /// The guest looks at all that it has once more, the disk's part included.
    fn checks(&mut self, units: u64) -> Result<()> {
        self.order(b"c")?;
        self.says(&format!("checked {units}"))
    }

    fn end(mut self) -> Result<()> {
        self.order(b"q")?;
        self.running.wait()?.passed(NAME).map(drop)
    }
}

#[test]
fn more_units_than_eight_come_are_reached_by_a_disk_and_go_again() -> Result<()> {
    let mut vm = Vm::start()?;
    ensure!(vm.control.status()?.max_memory_bytes == bytes(UNITS));
    vm.grow(0, 3)?;
    vm.grow(3, UNITS)?;
    vm.checks(UNITS)?;
    vm.set(2)?;
    // The newest go first; the registers have no order, so the guest finds the lowest.
    for unit in 2..UNITS {
        vm.ejects(unit)?;
        let left = vm.control.memory_changed()?;
        ensure!(left == bytes(UNITS - (unit - 1)), "{left} bytes after unit {unit}");
    }
    vm.has(2)?;
    vm.checks(2)?;
    // What comes to the same places is zero, which the guest checks.
    vm.grow(2, 5)?;
    vm.disk_is(DeviceState::Active)?;
    vm.end()
}

#[test]
fn a_guest_that_keeps_a_unit_has_it_still_and_can_be_asked_again() -> Result<()> {
    let mut vm = Vm::start()?;
    vm.grow(0, 2)?;
    vm.set(0)?;
    vm.refused(bytes(1), "has yet to give up memory")?;
    vm.says("asked 0")?;
    vm.order(KEEP)?;
    vm.ejects(1)?;
    ensure!(vm.control.memory_changed()? == bytes(1));
    let reason = vm.control.memory_declined()?;
    ensure!(reason.contains("0x100000000") && reason.contains("busy"), "{reason}");
    vm.checks(1)?;
    vm.set(0)?;
    vm.ejects(0)?;
    ensure!(vm.control.memory_changed()? == BOOT);
    vm.grow(0, 1)?;
    vm.end()
}

#[test]
fn a_guest_that_writes_nonsense_to_the_registers_harms_nobody() -> Result<()> {
    let mut vm = Vm::start()?;
    vm.grow(0, 2)?;
    vm.order(b"h")?;
    vm.says("done its worst")?;
    vm.has(2)?;
    vm.checks(2)?;
    vm.grow(2, 3)?;
    vm.end()
}

#[test]
fn amounts_that_cannot_be_are_refused_with_the_reason() -> Result<()> {
    let mut vm = Vm::start()?;
    let between = format!("not between {BOOT} and {}", bytes(UNITS));
    for bytes in [0, BOOT - UNIT / 2, bytes(UNITS + 1), u64::MAX] {
        vm.refused(bytes, &between)?;
    }
    vm.refused(BOOT + UNIT / 2, &format!("not {BOOT} and a multiple of {UNIT}"))?;
    vm.set(0)?;
    vm.has(0)?;
    vm.end()?;
    for (size, why) in [
        ("32M", "--max-memory of 33554432 bytes is less than --memory of 67108864 bytes"),
        ("100000001", "--max-memory of 100000001 bytes is no multiple of 2 MiB"),
        ("9000T", "--max-memory of 9895604649984000 bytes is more than"),
    ] {
        let ended = Machine::bare("hello")?.with(&["--max-memory", size]).run()?;
        ensure!(ended.ended(VmmExit::Memory) && ended.said.contains(why), "{ended:#?}");
    }
    Ok(())
}

#[test]
fn a_successor_of_a_killed_disk_knows_the_ram_that_came() -> Result<()> {
    let mut vm = Vm::start()?;
    vm.grow(0, 10)?;
    vm = vm.kill_disk()?;
    vm.reconnect()?;
    vm.checks(10)?;
    // RAM that comes while there is no backend.
    vm = vm.kill_disk()?;
    vm.set(11)?;
    vm.has(11)?;
    vm.reconnect()?;
    vm.says("came 10")?;
    vm.checks(11)?;
    vm.end()
}

#[test]
fn ram_goes_while_the_disk_is_dead_and_its_successor_never_hears_of_it() -> Result<()> {
    let mut vm = Vm::start()?;
    vm.grow(0, 2)?;
    vm.set(1)?;
    vm.says("asked 1")?;
    vm = vm.kill_disk()?;
    vm.order(EJECT)?;
    ensure!(vm.control.memory_changed()? == bytes(1));
    vm.says("ejected 1")?;
    vm.reconnect()?;
    vm.checks(1)?;
    vm.grow(1, 2)?;
    vm.checks(2)?;
    vm.disk_is(DeviceState::Active)?;
    vm.end()
}

/// A backend that hangs while it is to follow is cut off, and the guest gets its RAM.
#[test]
fn a_disk_that_does_not_follow_is_lost_and_the_ram_comes_nevertheless() -> Result<()> {
    let mut vm = Vm::start()?;
    vm.grow(0, 1)?;
    vm.stop_disk()?;
    vm.set(2)?;
    let reason = vm.control.lost("disk0")?;
    ensure!(reason.contains("did not follow the guest's memory"), "{reason}");
    vm.has(2)?;
    vm.disk = vm.disk.replace(Signal::KILL)?;
    vm.reconnect()?;
    vm.says("came 1")?;
    vm.checks(2)?;
    vm.end()
}

#[test]
fn a_reset_keeps_what_is_there_wiped_and_ends_the_wait_for_what_was_to_go() -> Result<()> {
    let mut vm = Vm::start()?;
    vm.grow(0, 3)?;
    vm.set(2)?;
    vm.says("asked 2")?;
    vm.order(b"r")?;
    ensure!(vm.control.memory_changed()? == bytes(2));
    // The guest finds the rest by looking, and that it is zero.
    vm.says("found 2")?;
    vm.has(2)?;
    vm.grow(2, 4)?;
    vm.checks(4)?;
    vm.end()
}
