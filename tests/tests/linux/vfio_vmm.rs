//! The VMM alone with devices of the host's: they come, go and come again, survive a reset of the
//! guest, interrupt by a line where the guest wants no messages, and are given back when the host
//! wants them.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nacre_proto::exit::VmmExit;
use nacre_proto::vmm::{Command, Event, NewDevice, NewDeviceKind, Outcome};
use nacre_tests::backend::Backend;
use nacre_tests::control::Control;
use nacre_tests::machine::{Ended, Machine, Running};
use nacre_tests::nacre::SANDBOX_PATIENCE;
use nacre_tests::passthrough::{Function, VFIO, named};
use nacre_tests::process::Signal;
use tempfile::TempDir;
use vfio::{Opened, Sysfs, group};
use vfio_bindings::bindings::vfio::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX};
use vfio_ioctls::{VfioContainer, VfioDevice};

use super::machine::{fs_backend, linux};

/// How often a device comes and goes.
const CYCLES: usize = 20;
/// All of the guest's memory is pinned, and so touched.
const MEMORY: [&str; 2] = ["--memory", "256M"];
/// The driver of the host's own.
const NVME: &str = "nvme";

/// Shell functions: the sum of a disk's first MiB, and how many interrupts a pattern has had.
const SHELL: &str = "sum() { dd if=/dev/nvme0n1 bs=1M count=1 iflag=direct 2>/dev/null | md5sum; }
count() { awk -v p=\"$1\" '$0 ~ p { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }' \
    /proc/interrupts; }
";

/// A guest that says when its disk has come and when it is gone.
const WATCH: &str = "echo READY
while :; do
    until test -e /dev/nvme0n1; do sleep 0.05; done
    before=$(count nvme); s=$(sum); echo FOUND $s; test $(count nvme) -gt $before && echo INTERRUPTS
    while test -e /dev/nvme0n1; do sleep 0.05; done
    echo GONE
done
";

/// What `md5sum` says in the guest of the disk that the host has now; the disk is then VFIO's.
fn taken_from_host(nvme: &Function) -> Result<String> {
    taken_from_host_of(nvme, 1)
}

/// The same of so many MiB of it.
fn taken_from_host_of(nvme: &Function, mib: u32) -> Result<String> {
    if nvme.driver().as_deref() != Some(NVME) {
        nvme.give_to(NVME)?;
    }
    let sum = host_sum_of(nvme, mib)?;
    nvme.give_to(VFIO)?;
    Ok(sum)
}

fn host_sum(nvme: &Function) -> Result<String> {
    host_sum_of(nvme, 1)
}

fn host_sum_of(nvme: &Function, mib: u32) -> Result<String> {
    let disk = nvme.disk()?;
    let script = format!("dd if={} bs=1M count={mib} 2>/dev/null | md5sum", disk.display());
    let output = std::process::Command::new("sh").args(["-c", &script]).output()?;
    Ok(String::from_utf8(output.stdout)?.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// A guest that runs `script` from its share, and what it needs.
struct Guest {
    machine: Machine,
    share: Share,
}

/// The guest's share and what serves it.
type Share = (TempDir, TempDir, Backend);

fn guest(script: &str) -> Result<Guest> {
    let (dir, share) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let backend = fs_backend(dir.path(), share.path())?;
    let machine = linux(share.path(), &format!("{SHELL}{script}"))?.with(&MEMORY).device(
        "job",
        "fs",
        backend.socket(),
    );
    Ok(Guest { machine, share: (dir, share, backend) })
}

/// A guest that watches for its disk, and runs.
fn watching() -> Result<(Share, Control, Running)> {
    let (control, theirs) = Control::new()?;
    let guest = guest(WATCH)?;
    let mut running = guest.machine.control(theirs).start()?;
    running.until("READY")?;
    Ok((guest.share, control, running))
}

fn add(control: &mut Control, nvme: &Function) -> Result<()> {
    let Opened { container, group, device } =
        group::open(&Sysfs::default(), nvme.address.parse()?)?;
    let kind = NewDeviceKind::Vfio { address: nvme.address.clone() };
    let command = Command::AddDevice { device: NewDevice { id: "disk".to_owned(), kind } };
    match control.ask_with(command, &[container.as_fd(), group.as_fd(), device.as_fd()])? {
        Outcome::Added { .. } => Ok(()),
        other => bail!("not added: {other:?}"),
    }
}

fn removed(control: &mut Control) -> Result<()> {
    let wanted = Event::DeviceRemoved { device: "disk".to_owned() };
    control.event(|event| (*event == wanted).then_some(()))
}

fn remove(control: &mut Control) -> Result<()> {
    let command = || Command::RemoveDevice { device: "disk".to_owned() };
    ensure!(control.ask(command(), None)? == Outcome::Done);
    let again = control.ask(command(), None)?;
    // The guest may have been as quick as the second request.
    ensure!(matches!(again, Outcome::Refused(_)), "{again:?}");
    removed(control)
}

/// Descriptors and mappings of a process.
fn held(running: &mut Running) -> Result<(usize, usize)> {
    let folder = PathBuf::from(format!("/proc/{}", running.process().id()));
    let maps =
        fs::read_to_string(folder.join("maps"))?.lines().filter(|l| l.contains("vfio")).count();
    Ok((fs::read_dir(folder.join("fd"))?.count(), maps))
}

#[test]
fn a_disk_of_the_hosts_comes_and_goes_twenty_times_and_nothing_is_left_of_it() -> Result<()> {
    let Some(nvme) = named(NVME) else { return Ok(()) };
    let expected = taken_from_host(&nvme)?;
    let (_share, mut control, mut running) = watching()?;
    let mut after_the_first = None;
    for cycle in 0..CYCLES {
        add(&mut control, &nvme)?;
        let found = running.until("FOUND ")?;
        ensure!(found == expected, "{found} instead of {expected} in cycle {cycle}");
        running.until("INTERRUPTS")?;
        remove(&mut control)?;
        running.until("GONE")?;
        let held = held(&mut running)?;
        // KVM's own device for VFIO is made with the first one and stays.
        ensure!(*after_the_first.get_or_insert(held) == held, "{after_the_first:?} {held:?}");
    }
    ensure!(control.ask(Command::Stop, None)? == Outcome::Done);
    running.wait()?;
    nvme.give_to(NVME)?;
    ensure!(host_sum(&nvme)? == expected, "the host reads something else");
    Ok(())
}

/// Whether the device may write to memory (PCI Local Bus 3.0, section 6.2.2: command register, bit 2).
fn is_bus_master(nvme: &Function) -> Result<bool> {
    let config = fs::read(nvme.folder().join("config"))?;
    Ok(config.get(4).context("a command register")? & 4 != 0)
}

#[test]
fn the_host_gets_a_disk_back_when_it_wants_it_and_free_when_the_vmm_is_killed() -> Result<()> {
    let Some(nvme) = named(NVME) else { return Ok(()) };
    taken_from_host(&nvme)?;
    let (_share, mut control, mut running) = watching()?;
    add(&mut control, &nvme)?;
    running.until("FOUND ")?;
    let (unbind, address) = (nvme.folder().join("driver/unbind"), nvme.address.clone());
    // It returns when nobody has the device any more.
    let unbound = thread::spawn(move || fs::write(unbind, address));
    removed(&mut control)?;
    running.until("GONE")?;
    unbound.join().ok().context("the thread panicked")??;
    nvme.give_to(VFIO)?;
    add(&mut control, &nvme)?;
    running.until("INTERRUPTS")?;
    ensure!(is_bus_master(&nvme)?, "the guest's driver is at work");
    running.process().signal(Signal::KILL)?;
    ensure!(running.wait()?.code.is_none(), "by a signal");
    ensure!(!is_bus_master(&nvme)?, "the device may still write to memory");
    // Another program, with none of our code for it, has the device at once and finds it disabled.
    let device = VfioDevice::new(&nvme.folder(), Arc::new(VfioContainer::new(None)?))?;
    // NVM Express 2.0, section 3.1.3: CC at 0x14, of which bit 0 enables the controller.
    let mut enabled = [0; 4];
    device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &2_u16.to_le_bytes(), 4);
    device.region_read(VFIO_PCI_BAR0_REGION_INDEX, &mut enabled, 0x14);
    ensure!(u32::from_le_bytes(enabled) & 1 == 0, "the controller is enabled: {enabled:?}");
    drop(device);
    nvme.give_to(NVME)
}

/// Reads 32 MiB of the disk at once, `look`s where in the guest's memory they went, and says of how many
/// pages how many lie at 4 GiB or above, and the sum of what is in them. The program that read them
/// waits meanwhile: nobody takes them from it.
const READER: &str = r#"
echo online_movable > /sys/devices/system/memory/auto_online_blocks
total() { awk '/MemTotal/ { print $2 }' /proc/meminfo; }
buffer() {
    while IFS=' -' read -r start end rest; do
        test $((0x$end - 0x$start)) -ge 33554432 && echo $((0x$start / 4096)) && return
    done < /proc/$1/maps
}
# An entry for each page (linux Documentation/admin-guide/mm/pagemap.rst): its number is in bits 0 to 54.
look() {
    dd if=/proc/$1/pagemap bs=8 skip=$(buffer $1) count=8192 2>/dev/null | od -An -v -t x8 |
        awk '{ for (i = 1; i <= NF; i++) { n++; high += substr($i, 4, 8) != "00000000" } }
            END { print high + 0, "of", n + 0 }'
}
reads() {
    dd if=/dev/nvme0n1 of=/pipe bs=32M count=1 iflag=direct 2>/dev/null &
    dd bs=1 count=1 of=/byte <&4 2>/dev/null
    pages=$(look $!)
    echo $1 $pages $({ cat /byte; head -c 33554431 <&4; } | md5sum)
    wait
}
mkfifo /pipe; exec 4<>/pipe
echo READY; until test -e /dev/nvme0n1; do sleep 0.05; done; echo FOUND
until test $(total) -gt 600000; do sleep 0.05; done
reads ADDED
until test $(total) -lt 300000; do sleep 0.05; done
reads REMOVED
"#;

/// How much of its memory a process holds in place.
fn locked_kib(running: &mut Running) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", running.process().id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).context("VmLck")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn a_disk_of_the_hosts_writes_to_memory_that_came_after_it_and_goes_on_when_that_went() -> Result<()>
{
    const BEFORE: u64 = 256 << 20;
    const WITH_MORE: u64 = 768 << 20;
    let Some(nvme) = named(NVME) else { return Ok(()) };
    let expected = taken_from_host_of(&nvme, 32)?;
    let (mut control, theirs) = Control::new()?;
    let guest = guest(READER)?;
    let mut running = guest.machine.with(&["--max-memory", "768M"]).control(theirs).start()?;
    running.until("READY")?;
    add(&mut control, &nvme)?;
    running.until("FOUND")?;
    control.set_memory(WITH_MORE)?;
    // What the guest began with ends at 256 MiB, and what came begins at 4 GiB.
    let said = running.until("ADDED ")?;
    let (high, rest) = said.split_once(' ').context("a number of pages")?;
    ensure!(rest == format!("of 8192 {expected}"), "{said} and not {expected}");
    ensure!(high.parse::<u64>()? > 8000, "the disk wrote elsewhere: {said}");
    ensure!(locked_kib(&mut running)? >= WITH_MORE >> 10, "what came is not pinned");
    control.set_memory(BEFORE)?;
    while control.memory_changed()? != BEFORE {}
    ensure!(running.until("REMOVED ")? == format!("0 of 8192 {expected}"), "after it went");
    ensure!(locked_kib(&mut running)? < (BEFORE >> 10) + 1024, "what went is still pinned");
    ensure!(running.wait_for(SANDBOX_PATIENCE)?.ended(VmmExit::PowerOff));
    nvme.give_to(NVME)
}

/// Runs a guest that has the disk from the start.
fn run_with(nvme: &Function, script: &str) -> Result<Ended> {
    let guest = guest(script)?;
    let device = format!("id=disk,address={}", nvme.address);
    guest.machine.with(&["--vfio", &device]).run_for(SANDBOX_PATIENCE)
}

fn says(ended: &Ended, wanted: &str) -> Result<()> {
    ensure!(ended.ended(VmmExit::PowerOff), "{ended:#?}");
    ensure!(ended.guest.iter().any(|line| line == wanted), "no {wanted:?}: {ended:#?}");
    Ok(())
}

#[test]
fn a_guest_that_resets_has_its_disk_again_with_what_it_wrote() -> Result<()> {
    let Some(nvme) = named(NVME) else { return Ok(()) };
    let expected = taken_from_host(&nvme)?;
    let script = "if test -e /job/again; then echo AGAIN $(sum) \
        $(dd if=/dev/nvme0n1 bs=512 skip=65540 count=1 iflag=direct 2>/dev/null | head -n 1)
        else echo FIRST $(sum); echo before | dd of=/dev/nvme0n1 bs=512 seek=65540 conv=sync,fsync \
        2>/dev/null; touch /job/again; sync; reboot -f; sleep 1000; fi\n";
    let ended = run_with(&nvme, script)?;
    says(&ended, &format!("FIRST {expected}"))?;
    says(&ended, &format!("AGAIN {expected} before"))?;
    nvme.give_to(NVME)
}

#[test]
fn a_disk_interrupts_by_its_line_where_the_guest_wants_no_messages() -> Result<()> {
    let Some(nvme) = named(NVME) else { return Ok(()) };
    let expected = taken_from_host(&nvme)?;
    // The next driver of the device has no messages then.
    let script = "d=$(readlink -f /sys/class/nvme/nvme0/device); a=$(basename $d)
        echo $a >$d/driver/unbind; echo 0 >$d/msi_bus; echo $a >/sys/bus/pci/drivers/nvme/bind
        until test -e /dev/nvme0n1; do sleep 0.05; done
        before=$(count 'IO-APIC.*nvme'); echo LINE $(sum)
        test $(count 'IO-APIC.*nvme') -gt $before && echo INTERRUPTS; grep nvme /proc/interrupts\n";
    let ended = run_with(&nvme, script)?;
    says(&ended, &format!("LINE {expected}"))?;
    says(&ended, "INTERRUPTS")?;
    nvme.give_to(NVME)
}

#[test]
fn what_the_vmm_can_t_be_given_is_refused_with_the_reason() -> Result<()> {
    let Some(nvme) = named(NVME) else { return Ok(()) };
    nvme.give_to(NVME)?;
    let ended = run_with(&nvme, "")?;
    ensure!(ended.code != Some(0) && ended.said.contains("has the driver nvme, not vfio-pci"));
    let absent = Function { address: "0000:7f:1f.7".to_owned() };
    let ended = run_with(&absent, "")?;
    ensure!(ended.said.contains("there is no PCI device 0000:7f:1f.7"), "{ended:#?}");
    let null = Path::new("/dev/null");
    let (_share, mut control, running) = watching()?;
    let kind = NewDeviceKind::Vfio { address: nvme.address.clone() };
    let command = Command::AddDevice { device: NewDevice { id: "disk".to_owned(), kind } };
    let nulls = [fs::File::open(null)?, fs::File::open(null)?, fs::File::open(null)?];
    let refused = control.ask_with(command, &nulls.each_ref().map(AsFd::as_fd))?;
    let Outcome::Refused(reason) = refused else { bail!("{refused:?}") };
    ensure!(reason.contains("no VFIO container"), "{reason}");
    ensure!(control.ask(Command::Stop, None)? == Outcome::Done);
    running.wait()?;
    Ok(())
}
