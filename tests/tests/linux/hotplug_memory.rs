//! RAM that comes to a Linux guest, is used, and goes again. What counts is the guest's own
//! `MemTotal`: a plug that Linux can't use is reported as a success by it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nacre_proto::vmm::DeviceState;
use nacre_tests::artifacts;
use nacre_tests::backend::Backend;
use nacre_tests::control::Control;
use nacre_tests::machine::{Ended, Machine, Running};
use nacre_tests::nacre::SANDBOX_PATIENCE;
use nacre_tests::process::{PATIENCE, Signal};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const UNIT: u64 = 128 * MIB;
const UNIT_KIB: u64 = UNIT >> 10;
/// More than what the guest is filled with.
const DISK_BYTES: u64 = 512 * MIB;
/// Has the guest put what comes where it can be taken from again.
const MOVABLE: &str = "memhp_default_state=online_movable";

/// Takes orders on the console, a line each.
const SCRIPT: &str = r#"
total() { sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo; }
test -e /job/rebooted && echo rebooted
echo ready
while read order; do
    case $order in
    total) echo "total $(total)" ;;
    fill)
        mkdir -p /full
        mount -t tmpfs -o size=90% full /full
        dd if=/dev/urandom of=/full/piece bs=1M count=16 2>/dev/null
        for part in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18; do
            echo $part; cat /full/piece
        done > /full/file
        echo "filled $(stat -c %s /full/file)" ;;
    disk)
        dd if=/full/file of=/dev/vda bs=1M oflag=direct conv=sync 2>/dev/null
        dd if=/dev/vda bs=1M count=289 iflag=direct 2>/dev/null |
            head -c $(stat -c %s /full/file) | cmp - /full/file && echo "same on the disk" ;;
    share)
        cp /full/file /job/file; sync; echo 1 > /proc/sys/vm/drop_caches
        cmp /job/file /full/file && echo "same on the share"; rm /job/file ;;
    empty) umount /full; echo 3 > /proc/sys/vm/drop_caches; echo emptied ;;
    hold)
        for pipe in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
            cat /dev/zero | sleep 100000 &
        done
        sleep 1; echo holding ;;
    reboot) touch /job/rebooted; sync; umount /job; reboot -f ;;
    log) dmesg | grep -iE 'memory.*fail|add_memory|unaligned|Eject incomplete|Call Trace|WARNING|BUG:|ACPI.*error|I/O error' | sed 's/^/log: /'; echo "log ends" ;;
    end) echo ending; break ;;
    esac
done
"#;

struct Guest {
    control: Control,
    running: Running,
    disk: Backend,
    boot: u64,
    /// What the guest has as it began, in KiB.
    total: u64,
    _share_backend: Backend,
    _folders: (TempDir, TempDir),
}

impl Guest {
    fn start(boot: u64, units: u64, more: &str) -> Result<Self> {
        let (dir, share) = (tempfile::tempdir()?, tempfile::tempdir()?);
        fs::write(share.path().join("run.sh"), SCRIPT)?;
        let shared = share.path().display().to_string();
        let files =
            Backend::start("nacre-fs", dir.path(), &["--shared-dir", &shared, "--tag", "job"])?;
        let disk = disk(dir.path())?;
        let (control, theirs) = Control::new()?;
        let cmdline = format!("console=ttyS0 quiet panic=-1 {more}");
        let machine =
            Machine::linux(&artifacts::kernel()?, &artifacts::shell_initramfs()?, &cmdline)?
                .with(&["--memory", &boot.to_string(), "--cpus", "2"])
                .with(&["--max-memory", &(boot + units * UNIT).to_string()])
                .device("job", "fs", files.socket())
                .device("disk", "blk", disk.socket())
                .control(theirs)
                .with_input();
        let running = machine.start()?;
        let folders = (dir, share);
        let mut guest = Self {
            control,
            running,
            disk,
            boot,
            total: 0,
            _share_backend: files,
            _folders: folders,
        };
        guest.says("ready")?;
        guest.total = guest.mem_total()?;
        Ok(guest)
    }

    /// Waits for a line.
    fn says(&mut self, start: &str) -> Result<String> {
        self.running.until_within(SANDBOX_PATIENCE, start)
    }

    fn order(&mut self, order: &str) -> Result<()> {
        let input = self.running.process().child().stdin.as_mut();
        Ok(writeln!(input.context("the guest's console")?, "{order}")?)
    }

    fn mem_total(&mut self) -> Result<u64> {
        self.order("total")?;
        self.says("total ")?.trim().parse().context("MemTotal")
    }

    /// The guest has exactly so many units more than it began with.
    fn comes_to(&mut self, units: u64) -> Result<()> {
        let wanted = self.total + units * UNIT_KIB;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let has = self.mem_total()?;
            if has == wanted {
                break;
            }
            ensure!(Instant::now() < deadline, "MemTotal is {has} kB and not {wanted} kB");
        }
        let bytes = self.control.status()?.memory_bytes;
        ensure!(bytes == self.boot + units * UNIT, "the VMM has {bytes} bytes");
        Ok(())
    }

    fn set(&mut self, units: u64) -> Result<()> {
        self.control.set_memory(self.boot + units * UNIT)
    }

    fn shrink_to(&mut self, units: u64) -> Result<()> {
        self.set(units)?;
        while self.control.memory_changed()? != self.boot + units * UNIT {}
        self.comes_to(units)
    }

    /// Fills more than boot RAM, and has the disk write and read it.
    fn disk_uses(&mut self) -> Result<()> {
        self.order("fill")?;
        let filled: u64 = self.says("filled ")?.trim().parse()?;
        ensure!(filled > self.boot, "{filled} bytes");
        self.order("disk")?;
        self.says("same on the disk").map(drop)
    }

    /// And has the share do so too.
    fn is_used(&mut self) -> Result<()> {
        self.disk_uses()?;
        self.order("share")?;
        self.says("same on the share").map(drop)
    }

    /// What the guest's memory takes of the host's.
    fn host_bytes(&mut self) -> Result<u64> {
        let id = self.running.process().id();
        let status = fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:"));
        let number = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
        Ok(number.context("RssShmem")?.trim().parse::<u64>()? << 10)
    }

    fn kill_disk(mut self) -> Result<Self> {
        self.disk = self.disk.replace(Signal::KILL)?;
        self.control.lost("disk")?;
        Ok(self)
    }

    fn reconnect(&mut self) -> Result<()> {
        self.control.reconnect("disk", &self.disk.connect()?.into())
    }

    /// The guest's kernel has nothing to complain of.
    fn end(self) -> Result<Ended> {
        self.end_but("nothing but this")
    }

    /// The guest's kernel has nothing to complain of but what has these words.
    fn end_but(mut self, expected: &str) -> Result<Ended> {
        self.order("log")?;
        self.says("log ends")?;
        let devices = self.control.status()?.devices;
        ensure!(devices.iter().all(|device| device.state == DeviceState::Active), "{devices:?}");
        self.order("end")?;
        let ended = self.running.wait_for(SANDBOX_PATIENCE)?;
        let is_complaint = |line: &&String| line.starts_with("log: ") && !line.contains(expected);
        if let Some(line) = ended.guest.iter().find(is_complaint) {
            bail!("the guest noticed: {line}");
        }
        Ok(ended)
    }
}

fn disk(dir: &Path) -> Result<Backend> {
    let path = dir.join("disk.img");
    File::create(&path)?.set_len(DISK_BYTES)?;
    let disk = path.display().to_string();
    Backend::start("nacre-blk", dir, &["--disk", &disk, "--lock-wait", "60"])
}

#[test]
fn linux_uses_what_comes_and_gives_it_back() -> Result<()> {
    let mut guest = Guest::start(256 * MIB, 12, MOVABLE)?;
    guest.set(1)?;
    guest.comes_to(1)?;
    guest.set(10)?;
    guest.comes_to(10)?;
    guest.is_used()?;
    let full = guest.host_bytes()?;
    guest.order("empty")?;
    guest.says("emptied")?;
    guest.shrink_to(1)?;
    let left = guest.host_bytes()?;
    ensure!(left <= 256 * MIB + UNIT && left < full, "{left} bytes of the host's, {full} before");
    guest.set(3)?;
    guest.comes_to(3)?;
    guest.shrink_to(0)?;
    guest.end().map(drop)
}

#[test]
fn an_odd_size_a_killed_disk_and_a_reboot_lose_nothing_of_what_came() -> Result<()> {
    let mut guest = Guest::start(258 * MIB, 6, MOVABLE)?;
    guest = guest.kill_disk()?;
    guest.set(5)?;
    guest.reconnect()?;
    guest.comes_to(5)?;
    guest = guest.kill_disk()?;
    guest.reconnect()?;
    guest.disk_uses()?;
    guest.order("reboot")?;
    guest.says("rebooted")?;
    guest.says("ready")?;
    guest.comes_to(5)?;
    guest.shrink_to(2)?;
    guest.end().map(drop)
}

#[test]
fn a_guest_that_cannot_give_it_up_says_so_and_keeps_it() -> Result<()> {
    // What comes is for the kernel too, which takes its own memory from there first.
    let mut guest = Guest::start(256 * MIB, 2, "")?;
    guest.set(1)?;
    guest.comes_to(1)?;
    guest.order("hold")?;
    guest.says("holding")?;
    guest.set(0)?;
    let reason = guest.control.memory_declined()?;
    ensure!(reason.contains("keeps the memory device at 0x100000000"), "{reason}");
    guest.comes_to(1)?;
    guest.set(2)?;
    guest.comes_to(2)?;
    guest.end_but("Offline failed").map(drop)
}
