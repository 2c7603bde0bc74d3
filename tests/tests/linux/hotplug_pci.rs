//! Devices come to a running Linux guest and go again: Debian's kernel with its acpiphp, asked by
//! the VMM's control socket.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nacre_proto::vmm::{DeviceState, DeviceStatus};
use nacre_tests::artifacts;
use nacre_tests::backend::Backend;
use nacre_tests::control::Control;
use nacre_tests::machine::{Machine, Running};
use nacre_tests::nacre::SANDBOX_PATIENCE;
use nacre_tests::packet;
use nacre_tests::process::Signal;
use tempfile::TempDir;

const NET: u16 = 1;
const BLK: u16 = 2;
const FS: u16 = 26;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// Runs what is put into the share, one script after the other, also after a reboot.
const INIT: &str = "n=$(ls /job | grep -c '^out-[0-9]*$')
while :; do
    while ! test -e /job/cmd-$n; do sleep 0.05; done
    { sh /job/cmd-$n; echo exit $?; } > /job/part 2>&1
    mv /job/part /job/out-$n
    n=$((n + 1))
done
";
/// What the kernel says that it would not say of devices that come and go in peace.
const COMPLAINTS: &str =
    "dmesg | grep -iE 'error|fail|warn|bug:|oops|call trace|cannot|unable|timed out' || true";

/// A guest that does what it is told.
struct Guest {
    control: Control,
    running: Running,
    share: TempDir,
    _job: (Backend, TempDir),
    commands: usize,
    complaints: String,
}

impl Guest {
    fn boot(cmdline: &str, args: &[&str]) -> Result<Self> {
        let (share, folder) = (tempfile::tempdir()?, tempfile::tempdir()?);
        fs::write(share.path().join("run.sh"), INIT)?;
        let shared = share.path().display().to_string();
        let job =
            Backend::start("nacre-fs", folder.path(), &["--shared-dir", &shared, "--tag", "job"])?;
        let (control, theirs) = Control::new()?;
        let running =
            Machine::linux(&artifacts::kernel()?, &artifacts::shell_initramfs()?, cmdline)?
                .with(&["--memory", "512M", "--log-level", "info"])
                .with(args)
                .device("job", "fs", job.socket())
                .control(theirs)
                .start()?;
        let job = (job, folder);
        let complaints = String::new();
        let mut guest = Self { control, running, share, _job: job, commands: 0, complaints };
        guest.complaints = guest.sh(COMPLAINTS)?;
        Ok(guest)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.share.path().join(format!("{name}-{}", self.commands))
    }

    /// What a script prints; it has to succeed.
    fn sh(&mut self, script: &str) -> Result<String> {
        let (part, command, out) =
            (self.share.path().join("next"), self.file("cmd"), self.file("out"));
        fs::write(&part, script)?;
        fs::rename(&part, &command)?;
        let deadline = Instant::now() + SANDBOX_PATIENCE;
        while !out.exists() {
            ensure!(Instant::now() < deadline, "the guest does not answer to {script:?}");
            ensure!(self.running.process().is_running()?, "the VMM ended");
            thread::sleep(Duration::from_millis(20));
        }
        self.commands += 1;
        let said = fs::read_to_string(&out)?;
        let said = said.strip_suffix("exit 0\n").with_context(|| format!("{script:?}: {said}"));
        Ok(said?.to_owned())
    }

    /// Runs `step` in the guest until it succeeds.
    fn until(&mut self, step: &str) -> Result<String> {
        self.sh(&format!("for i in $(seq 600); do {step} && exit 0; sleep 0.05; done; exit 1"))
    }

    fn reboot(&mut self) -> Result<()> {
        let done = format!("/job/rebooted-{}", self.commands);
        self.sh(&format!("test -e {done} && exit 0; touch {done}; sync; reboot -f; sleep 1000"))?;
        Ok(())
    }

    fn device(&mut self, id: &str) -> Result<Option<DeviceStatus>> {
        Ok(self.control.status()?.devices.into_iter().find(|device| device.id == id))
    }

    fn descriptors(&mut self) -> Result<usize> {
        let folder = format!("/proc/{}/fd", self.running.process().id());
        Ok(fs::read_dir(folder)?.count())
    }

    fn remove(&mut self, id: &str) -> Result<()> {
        self.control.remove(id)?;
        self.control.removed(id)
    }

    /// The kernel has nothing to complain of that it had not before.
    fn is_content(&mut self) -> Result<()> {
        let now = self.sh(COMPLAINTS)?;
        ensure!(now == self.complaints, "the kernel complains: {now}");
        Ok(())
    }
}

/// A disk of one MiB with something in it, and its backend.
struct Disk {
    backend: Backend,
    folder: TempDir,
}

impl Disk {
    fn new(seed: u8) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let image = folder.path().join("disk.img");
        let bytes: Vec<u8> =
            (0..1_u32 << 20).map(|at| seed ^ (at / 512).to_le_bytes()[0]).collect();
        fs::write(&image, bytes)?;
        let image = image.display().to_string();
        let backend = Backend::start("nacre-blk", folder.path(), &["--disk", &image])?;
        Ok(Self { backend, folder })
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    fn sum(&self) -> Result<String> {
        let out = Command::new("md5sum").arg(self.image()).output()?;
        let out = String::from_utf8(out.stdout)?;
        Ok(out.split(' ').next().context("a sum")?.to_owned())
    }

    fn add(&self, guest: &mut Guest, id: &str) -> Result<String> {
        guest.control.add(id, BLK, &self.backend.connect()?.into())
    }
}

/// The guest's block device at an address; `$d` is its name afterwards.
fn block(address: &str) -> String {
    format!("d=$(ls /sys/bus/pci/devices/{address}/virtio*/block 2>/dev/null) && test -b /dev/$d")
}

#[test]
fn a_disk_comes_and_goes_twenty_times_and_leaves_nothing() -> Result<()> {
    let mut guest = Guest::boot(CMDLINE, &[])?;
    let mut before = 0;
    for round in 0..20_u8 {
        let disk = Disk::new(round)?;
        let sum = disk.sum()?;
        let address = disk.add(&mut guest, "disk")?;
        ensure!(address == "0000:00:02.0", "{address}: the slot is used again");
        let script =
            format!("{} && md5sum < /dev/$d && echo guest > /dev/$d && sync", block(&address));
        let said = guest.until(&script)?;
        ensure!(said.starts_with(&sum), "{said}");
        ensure!(fs::read(disk.image())?.starts_with(b"guest\n"), "what the guest wrote is there");
        guest.remove("disk")?;
        guest.until("! ls /sys/bus/pci/devices | grep -q 02.0")?;
        ensure!(guest.device("disk")?.is_none());
        match round {
            0 => before = guest.descriptors()?,
            _ => ensure!(guest.descriptors()? == before, "a descriptor stayed in round {round}"),
        }
        let _ended = disk.backend.stop()?;
    }
    guest.is_content()
}

#[test]
fn a_disk_that_grows_is_as_large_to_the_guest() -> Result<()> {
    let mut guest = Guest::boot(CMDLINE, &[])?;
    let mut disk = Disk::new(9)?;
    let address = disk.add(&mut guest, "disk")?;
    guest.until(&format!("{} && test $(cat /sys/block/$d/size) = 2048", block(&address)))?;
    for sectors in [4096, 8192] {
        fs::File::options().write(true).open(disk.image())?.set_len(sectors * 512)?;
        disk.backend.process().signal(Signal::HUP)?;
        let script = format!("{} && test $(cat /sys/block/$d/size) = {sectors}", block(&address));
        guest.until(&script)?;
        // Its successor says the same, and tells of the next growth.
        disk.backend = disk.backend.replace(Signal::KILL)?;
        guest.control.lost("disk")?;
        guest.control.reconnect("disk", &disk.backend.connect()?.into())?;
    }
    let last =
        format!("{} && printf end | dd of=/dev/$d bs=512 seek=8191 && sync", block(&address));
    guest.sh(&last)?;
    ensure!(fs::read(disk.image())?[8191 * 512..].starts_with(b"end"));
    guest.is_content()
}

#[test]
fn a_nic_and_a_share_come_to_a_running_guest_and_go_again() -> Result<()> {
    // A thread has a network namespace of its own; its children are born into it.
    thread::spawn(nic_and_share).join().expect("the test does not panic")
}

fn nic_and_share() -> Result<()> {
    packet::own_namespace()?;
    let ip = |args: &[&str]| -> Result<()> {
        ensure!(Command::new("ip").args(args).status()?.success(), "ip {args:?}");
        Ok(())
    };
    ip(&["tuntap", "add", "t0", "mode", "tap", "vnet_hdr"])?;
    ip(&["link", "set", "t0", "up"])?;
    ip(&["addr", "add", "10.77.0.1/24", "dev", "t0"])?;
    let mut guest = Guest::boot(CMDLINE, &[])?;
    let mut before = 0;
    for round in 0..2 {
        let (folder, extra) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let nic_args = ["--tap", "t0", "--mac", "02:00:00:00:00:07"];
        let nic = Backend::start("nacre-net", folder.path(), &nic_args)?;
        fs::write(extra.path().join("greeting"), format!("salve {round}\n"))?;
        let shared = extra.path().display().to_string();
        let share_args = ["--shared-dir", &shared, "--tag", "extra"];
        let share = Backend::start("nacre-fs", folder.path(), &share_args)?;
        guest.control.add("nic", NET, &nic.connect()?.into())?;
        guest.control.add("extra", FS, &share.connect()?.into())?;
        guest.until("ls /sys/class/net | grep -q eth0")?;
        guest.sh("ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0")?;
        guest.until("ping -c 1 -W 5 10.77.0.1 > /dev/null")?;
        guest.until("mkdir -p /extra && mount -t virtiofs extra /extra")?;
        let said = guest.sh("cat /extra/greeting; echo vale > /extra/answer; umount /extra")?;
        ensure!(said == format!("salve {round}\n"), "{said}");
        ensure!(fs::read_to_string(extra.path().join("answer"))? == "vale\n");
        guest.remove("nic")?;
        guest.remove("extra")?;
        guest.until("! ls /sys/class/net | grep -q eth0")?;
        match round {
            0 => before = guest.descriptors()?,
            _ => ensure!(guest.descriptors()? == before, "a descriptor stayed in round {round}"),
        }
        let _ended = (nic.stop()?, share.stop()?);
    }
    guest.is_content()
}

#[test]
fn more_devices_than_a_bus_has_slots_are_found_on_a_second_segment() -> Result<()> {
    const DISKS: u8 = 34;
    let mut guest = Guest::boot(CMDLINE, &["--pci-segments", "2"])?;
    let mut disks = Vec::new();
    for number in 0..DISKS {
        let disk = Disk::new(number)?;
        let address = disk.add(&mut guest, &format!("disk{number}"))?;
        disks.push((disk, address));
    }
    let (last, address) = &disks[usize::from(DISKS) - 1];
    ensure!(address == "0001:00:04.0", "{address}");
    let said = guest.until(&format!("{} && md5sum < /dev/$d", block(address)))?;
    ensure!(said.starts_with(&last.sum()?), "{said}");
    guest.until(&format!("test $(ls /sys/block | grep -c ^vd) = {DISKS}"))?;
    guest.remove(&format!("disk{}", DISKS - 1))?;
    guest.until(&format!("! test -e /sys/bus/pci/devices/{address}"))?;
    let again = last.backend.connect()?.into();
    ensure!(guest.control.add("again", BLK, &again)? == *address);
    let said = guest.until(&format!("{} && md5sum < /dev/$d", block(address)))?;
    ensure!(said.starts_with(&last.sum()?), "{said}");
    guest.is_content()
}

#[test]
fn a_backend_may_die_at_any_time_of_a_devices_life() -> Result<()> {
    let mut guest = Guest::boot(CMDLINE, &[])?;
    // While it is added.
    let (theirs, ours) = UnixStream::pair()?;
    drop(theirs);
    let refusal = guest.control.add("dead", BLK, &ours.into());
    let refusal = refusal.expect_err("nobody is there").to_string();
    ensure!(refusal.contains("no backend"), "{refusal}");
    ensure!(guest.device("dead")?.is_none());
    // Afterwards: another one comes.
    let mut disk = Disk::new(1)?;
    let address = disk.add(&mut guest, "disk")?;
    guest.until(&block(&address))?;
    disk.backend = disk.backend.replace(Signal::KILL)?;
    guest.control.lost("disk")?;
    guest.control.reconnect("disk", &disk.backend.connect()?.into())?;
    let said = guest.sh(&format!("{} && md5sum < /dev/$d", block(&address)))?;
    ensure!(said.starts_with(&disk.sum()?), "{said}");
    // None comes: the device can go all the same.
    disk.backend.process().signal(Signal::KILL)?;
    guest.control.lost("disk")?;
    guest.remove("disk")?;
    guest.until(&format!("! test -e /sys/bus/pci/devices/{address}"))?;
    // It was asked to go before: another one comes, and it goes.
    let mut disk = Disk::new(2)?;
    let address = disk.add(&mut guest, "disk")?;
    guest.until(&block(&address))?;
    let stopped = disk.backend.process();
    stopped.signal(Signal::STOP)?;
    guest.control.remove("disk")?;
    let again = guest.control.remove("disk").expect_err("it is leaving").to_string();
    ensure!(again.contains("already"), "{again}");
    disk.backend = disk.backend.replace(Signal::KILL)?;
    guest.control.lost("disk")?;
    guest.control.reconnect("disk", &disk.backend.connect()?.into())?;
    guest.control.removed("disk")?;
    guest.until(&format!("! test -e /sys/bus/pci/devices/{address}"))?;
    guest.is_content()
}

#[test]
fn a_reboot_keeps_what_was_added_and_ends_what_was_to_go() -> Result<()> {
    // A guest that has no ear for hotplug.
    let mut guest = Guest::boot(&format!("{CMDLINE} acpiphp.disable=1"), &[])?;
    let (kept, leaving) = (Disk::new(3)?, Disk::new(4)?);
    let kept_at = kept.add(&mut guest, "kept")?;
    let leaving_at = leaving.add(&mut guest, "leaving")?;
    guest.reboot()?;
    for address in [&kept_at, &leaving_at] {
        guest.until(&block(address))?;
    }
    guest.control.remove("leaving")?;
    let status = guest.device("leaving")?.context("it is there")?;
    ensure!(status.leaving && status.state == DeviceState::Active, "{status:?}");
    let again = guest.control.remove("leaving").expect_err("it is leaving").to_string();
    ensure!(again.contains("already"), "{again}");
    guest.sh(&format!("{} && md5sum < /dev/$d", block(&leaving_at)))?;
    guest.reboot()?;
    guest.control.removed("leaving")?;
    let said = guest.until(&format!("{} && md5sum < /dev/$d", block(&kept_at)))?;
    ensure!(said.starts_with(&kept.sum()?), "{said}");
    guest.sh(&format!("! test -e /sys/bus/pci/devices/{leaving_at}"))?;
    ensure!(guest.device("leaving")?.is_none());
    ensure!(guest.control.status()?.resets == 2);
    Ok(())
}
