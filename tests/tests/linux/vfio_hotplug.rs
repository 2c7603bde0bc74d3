//! The host's devices given to sandboxes that run, and taken from them again; and what comes and
//! goes beside them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Attached, User};
use nacre_tests::passthrough::{Function, VFIO, named};
use nacre_tests::process::child_of;

/// How often a device comes and goes by `nacre`; twenty times is the matter of `vfio_vmm`.
const CYCLES: usize = 3;

/// A sandbox called `hot` that waits.
fn waiting(user: &User, more: &[&str]) -> Result<Attached> {
    let options = [&["--name", "hot", "--memory", "256M"], more].concat();
    let script = "echo up; while :; do sleep 1; done";
    let running = Attached::start(&mut user.run_command(&options, &["sh", "-c", script])?)?;
    running.until("up")?;
    Ok(running)
}

fn add(user: &User, function: &Function) -> Result<(String, Vec<String>)> {
    let device = format!("{},bind", function.address);
    let answer = user.nacre(&["device", "add", "hot", "vfio", &device])?.code(0)?;
    let mut words = answer.out.split_whitespace().map(str::to_owned);
    let id = words.next().context("an id")?;
    Ok((id, words.skip(1).collect()))
}

fn remove(user: &User, id: &str) -> Result<()> {
    user.nacre(&["device", "remove", "hot", id])?.code(0)?;
    Ok(())
}

/// What a VMM holds: descriptors, memory slots, locked memory.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    fds: BTreeMap<String, usize>,
    locked: String,
}

impl Held {
    fn by(vmm: rustix::process::Pid) -> Result<Self> {
        let process = Path::new("/proc").join(vmm.as_raw_nonzero().to_string());
        let mut fds = BTreeMap::new();
        for entry in fs::read_dir(process.join("fd"))? {
            let target = fs::read_link(entry?.path())?.to_string_lossy().into_owned();
            // The numbers of pipes and sockets say nothing.
            let kind = target.split(":[").next().unwrap_or_default().to_owned();
            *fds.entry(kind).or_default() += 1;
        }
        let status = fs::read_to_string(process.join("status"))?;
        let locked = status.lines().find(|line| line.starts_with("VmLck:")).context("VmLck")?;
        Ok(Self { fds, locked: locked.to_owned() })
    }
}

#[test]
fn a_disk_that_comes_and_goes_again_and_again_leaves_nothing_behind() -> Result<()> {
    let Some(nvme) = named("nvme") else { return Ok(()) };
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let mut running = waiting(&user, &[])?;
    let vmm = child_of(running.process().id(), "nacre-vmm")?.context("a VMM")?;
    let mut held = None;
    for cycle in 0..CYCLES {
        let (id, places) = add(&user, &nvme)?;
        ensure!(places == ["/dev/nvme0n1"], "{cycle}: {places:?}");
        let script = "dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | wc -c";
        let read = user.nacre(&["exec", "hot", "sh", "-c", script])?;
        read.prints("262144\n").with_context(|| format!("cycle {cycle}"))?;
        remove(&user, &id)?;
        ensure!(nvme.driver().as_deref() == Some("nvme"), "{cycle}: {:?}", nvme.driver());
        nvme.disk()?;
        let now = Held::by(vmm)?;
        // What is made once and kept is there after the first time.
        match &held {
            None => held = Some(now),
            Some(first) => ensure!(*first == now, "cycle {cycle}: {first:#?} and then {now:#?}"),
        }
    }
    user.nacre(&["rm", "-f", "hot"])?.code(0)?;
    running.wait()?;
    before.and_nothing_more(user.state())
}

#[test]
fn a_nic_and_a_virtual_function_come_and_go() -> Result<()> {
    let (Some(nic), Some(physical)) = (named("virtio-net"), named("nvme-sriov")) else {
        return Ok(());
    };
    let function = physical.virtual_function()?;
    let user = User::new()?;
    let running = waiting(&user, &[])?;
    let (first, interfaces) = add(&user, &nic)?;
    let (second, disks) = add(&user, &function)?;
    ensure!(interfaces.len() == 1 && disks.len() == 1, "{interfaces:?} {disks:?}");
    ensure!(nic.driver().as_deref() == Some(VFIO), "{:?}", nic.driver());
    let script = format!("cat /sys/class/net/{}/address; head -c 8 {}", interfaces[0], disks[0]);
    let read = user.nacre(&["exec", "hot", "sh", "-c", &script])?.code(0)?;
    ensure!(read.out.contains(':') && read.out.ends_with("\0\0\0\0"), "{read:?}");
    remove(&user, &first)?;
    remove(&user, &second)?;
    ensure!(nic.driver().as_deref() == Some("virtio-pci"), "{:?}", nic.driver());
    nic.interface()?;
    ensure!(function.driver().is_none(), "{:?}", function.driver());
    user.nacre(&["rm", "-f", "hot"])?.code(0)?;
    running.wait()?;
    Ok(())
}

#[test]
fn a_device_reaches_memory_that_came_after_it() -> Result<()> {
    let Some(nvme) = named("nvme") else { return Ok(()) };
    let user = User::new()?;
    let bound = nvme.bound();
    let running = waiting(&user, &["--max-memory", "768M", "--device", &bound])?;
    user.nacre(&["resize", "--memory", "768M", "hot"])?.code(0)?;
    // A file in memory as large as what was there before: the buffers are in what came.
    let script = "dd if=/dev/nvme0n1 bs=4M count=1 iflag=direct 2>/dev/null | md5sum; \
        dd if=/dev/zero of=/fill bs=1M count=240 2>/dev/null; \
        for i in 1 2 3; do dd if=/dev/nvme0n1 bs=32M count=1 iflag=direct 2>/dev/null | \
        dd bs=4M count=1 iflag=fullblock 2>/dev/null | md5sum; done";
    let answer = user.nacre(&["exec", "hot", "sh", "-c", script])?.code(0)?;
    let mut sums = answer.out.lines();
    let first = sums.next().context("a sum")?.to_owned();
    ensure!(sums.clone().count() == 3 && sums.all(|sum| sum == first), "{answer:?}");
    user.nacre(&["rm", "-f", "hot"])?.code(0)?;
    running.wait()?;
    Ok(())
}
