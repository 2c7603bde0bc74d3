//! The host's devices given to sandboxes: their data, their interrupts, and the host's own use of
//! them afterwards.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::RunExit;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Answer, Attached, User};
use nacre_tests::passthrough::{Function, VFIO, disk_content, named};
use nacre_tests::process::{Signal, child_of, kill_child_of, until};

/// Small: all of it is pinned, and so touched, before the guest runs.
const MEMORY: [&str; 2] = ["--memory", "256M"];
/// How much of a disk is compared, from its start. Tests write beyond it.
const COMPARED_BYTES: u64 = 4 << 20;
/// Where tests write, in bytes.
const WRITTEN_AT: u64 = 32 << 20;

/// Shell functions: how many interrupts a pattern of names has had, and the sum of what is compared.
const SHELL: &str = "count() { awk -v p=\"$1\" '$0 ~ p { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } \
    END { print n + 0 }' /proc/interrupts; }\n\
    sum() { dd if=$1 bs=1M count=4 iflag=direct 2>/dev/null | md5sum; }\n";

fn options<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&MEMORY, more].concat()
}

fn script(text: &str) -> String {
    format!("{SHELL}{text}")
}

/// What `md5sum` says of the start of a file of the host.
fn sum(path: &std::path::Path) -> Result<String> {
    let mut start = Vec::new();
    File::open(path)?.take(COMPARED_BYTES).read_to_end(&mut start)?;
    let copy = tempfile::NamedTempFile::new()?;
    fs::write(copy.path(), start)?;
    let said = Command::new("md5sum").stdin(copy.reopen()?).output()?.stdout;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// What is on a disk of the host: by the file that it was made from, where that is known.
fn expected(nvme: &Function) -> Result<String> {
    let disk = sum(&nvme.disk()?)?;
    if let Some(content) = disk_content() {
        ensure!(sum(&content)? == disk, "the host reads something else from its disk");
    }
    Ok(disk)
}

/// The host has its NVMe controller again, and what the guest wrote is on its disk.
fn is_the_hosts_disk_again(nvme: &Function, written: &str) -> Result<()> {
    ensure!(nvme.driver().as_deref() == Some("nvme"), "{:?}", nvme.driver());
    let mut disk = File::open(nvme.disk()?)?;
    disk.seek(SeekFrom::Start(WRITTEN_AT))?;
    let mut found = vec![0; written.len()];
    disk.read_exact(&mut found)?;
    ensure!(found == written.as_bytes(), "{:?}", String::from_utf8_lossy(&found));
    Ok(())
}

/// The host has its nic again, and reaches the other end of it.
fn is_the_hosts_nic_again(nic: &Function) -> Result<()> {
    ensure!(nic.driver().as_deref() == Some("virtio-pci"), "{:?}", nic.driver());
    let name = nic.interface()?;
    let script = format!(
        "ip netns add vfio-test && ip link set {name} netns vfio-test && \
         ip -n vfio-test addr add 10.0.77.9/24 dev {name} && ip -n vfio-test link set {name} up && \
         ip netns exec vfio-test ping -c 2 -W 20 10.0.77.2; code=$?; ip netns del vfio-test; exit $code"
    );
    let output = Command::new("sh").args(["-c", &script]).output()?;
    ensure!(output.status.success(), "{output:?}");
    // The interface comes back from a network that ends a moment later.
    until("the interface", || Ok(fs::exists(format!("/sys/class/net/{name}"))?))
}

#[test]
fn an_nvme_disk_has_the_host_s_bytes_and_keeps_what_the_guest_writes() -> Result<()> {
    let Some(nvme) = named("nvme") else { return Ok(()) };
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let expected = expected(&nvme)?;
    let script = script(
        "before=$(count nvme); sum /dev/nvme0n1; \
         echo the guest was here | dd of=/dev/nvme0n1 bs=512 seek=65536 conv=sync,fsync 2>/dev/null; \
         dd if=/dev/nvme0n1 bs=512 skip=65536 count=1 iflag=direct 2>/dev/null | head -n 1; \
         test $(count nvme) -gt $before && echo interrupts; \
         stat -c %t:%T /dev/nvme0n1; cat /sys/class/block/nvme0n1/dev",
    );
    let bound = nvme.bound();
    let answer = user.run(&options(&["--device", &bound]), &["sh", "-c", &script])?.code(0)?;
    let mut lines = answer.out.lines();
    ensure!(lines.next() == Some(expected.trim()), "{answer:?} and not {expected}");
    ensure!(lines.next() == Some("the guest was here"), "{answer:?}");
    ensure!(lines.next() == Some("interrupts"), "no MSI-X: {answer:?}");
    let (node, number) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    ensure!(same_number(node, number), "the node is another device: {answer:?}");
    before.and_nothing_more(user.state())?;
    is_the_hosts_disk_again(&nvme, "the guest was here\n")
}

/// Whether `stat`, in hexadecimal, and sysfs, in decimal, mean the same device.
fn same_number(node: &str, number: &str) -> bool {
    let pair = |text: &str, radix| {
        let (major, minor) = text.split_once(':')?;
        Some((u32::from_str_radix(major, radix).ok()?, u32::from_str_radix(minor, radix).ok()?))
    };
    pair(node, 16).is_some() && pair(node, 16) == pair(number, 10)
}

#[test]
fn a_nic_of_the_hosts_pings_and_its_interrupts_rise() -> Result<()> {
    let Some(nic) = named("virtio-net") else { return Ok(()) };
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let device = format!("{},ip=10.0.77.15/24", nic.bound());
    let script = script(
        "before=$(count -input); ping -c 3 -W 20 10.0.77.2 && \
         test $(count -input) -gt $before && echo interrupts",
    );
    let answer = user.run(&options(&["--device", &device]), &["sh", "-c", &script])?.code(0)?;
    ensure!(answer.out.contains("3 packets received"), "{answer:?}");
    ensure!(answer.out.contains("interrupts"), "no MSI-X: {answer:?}");
    before.and_nothing_more(user.state())?;
    is_the_hosts_nic_again(&nic)
}

#[test]
fn a_virtual_function_reads_the_disk_while_the_host_has_the_physical_one() -> Result<()> {
    let Some(physical) = named("nvme-sriov") else { return Ok(()) };
    let expected = expected(&physical)?;
    let function = physical.virtual_function()?;
    let user = User::new()?;
    let script = script("before=$(count nvme); sum /dev/nvme*n1; test $(count nvme) -gt $before");
    let bound = function.bound();
    let answer = user.run(&options(&["--device", &bound]), &["sh", "-c", &script])?;
    answer.prints(&expected)?;
    ensure!(physical.driver().as_deref() == Some("nvme"), "{:?}", physical.driver());
    ensure!(self::expected(&physical)? == expected, "the host's disk has changed");
    Ok(())
}

#[test]
fn two_devices_work_side_by_side_while_a_backend_is_killed() -> Result<()> {
    let (Some(nvme), Some(nic)) = (named("nvme"), named("virtio-net")) else { return Ok(()) };
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let expected = expected(&nvme)?;
    let (disk, net) = (nvme.bound(), format!("{},ip=10.0.77.15/24", nic.bound()));
    let options = options(&["--name", "two", "--device", &disk, "--device", &net]);
    let script = script(
        "echo up; for i in 1 2 3 4 5 6; do sum /dev/nvme0n1; ping -c 1 -W 20 10.0.77.2 >/dev/null && \
         echo pong; ls / >/dev/null && cat /bin/busybox | wc -c >/dev/null && echo share; done",
    );
    let running = Attached::start(&mut user.run_command(&options, &["sh", "-c", &script])?)?;
    running.until("up")?;
    let mut running = running;
    let supervisor = running.process().id();
    for _ in 0..2 {
        kill_child_of(supervisor, "nacre-fs")?;
        running.until("share")?;
    }
    let answer = running.wait()?.code(0)?;
    let sums = answer.out.lines().filter(|line| *line == expected.trim()).count();
    let pongs = answer.out.lines().filter(|line| *line == "pong").count();
    ensure!(sums >= 3 && pongs >= 3, "{answer:?} and not {expected}");
    let kinds = ["pong", "share"];
    let all_good = |line: &str| line == expected.trim() || kinds.contains(&line);
    ensure!(answer.out.lines().all(all_good), "{answer:?} and not {expected}");
    before.and_nothing_more(user.state())?;
    is_the_hosts_nic_again(&nic)
}

/// A sandbox that has the disk and writes to it without end, once it does.
fn writer(user: &User, nvme: &Function) -> Result<Attached> {
    let bound = nvme.bound();
    let options = options(&["--name", "writer", "--device", &bound]);
    let script = "echo 1234 | dd of=/dev/nvme0n1 bs=512 seek=65536 conv=sync,fsync 2>/dev/null; \
        echo up; while :; do dd if=/dev/zero of=/dev/nvme0n1 bs=64k seek=640 count=64 oflag=direct \
        2>/dev/null; done";
    let running = Attached::start(&mut user.run_command(&options, &["sh", "-c", script])?)?;
    running.until("up")?;
    Ok(running)
}

#[test]
fn a_device_is_refused_to_another_sandbox_and_a_vmm_that_is_killed_leaves_it_to_the_host()
-> Result<()> {
    let Some(nvme) = named("nvme") else { return Ok(()) };
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let mut running = writer(&user, &nvme)?;
    let bound = nvme.bound();
    let answer = user.run(&options(&["--device", &bound]), &["true"])?;
    refused(answer, "is in use by another process")?;
    ensure!(running.process().is_running()?, "the first one ended");
    kill_child_of(running.process().id(), "nacre-vmm")?;
    running.wait()?.code(i32::from(u8::from(RunExit::VmmDied)))?;
    before.and_nothing_more(user.state())?;
    is_the_hosts_disk_again(&nvme, "1234\n")
}

#[test]
fn a_supervisor_that_is_killed_leaves_the_device_to_who_clears_up() -> Result<()> {
    let Some(nvme) = named("nvme") else { return Ok(()) };
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let mut running = writer(&user, &nvme)?;
    let vmm = child_of(running.process().id(), "nacre-vmm")?.context("a VMM")?;
    running.process().signal(Signal::KILL)?;
    ensure!(running.wait()?.code.is_none(), "it was not killed");
    // The kernel kills it with its supervisor, in its own time.
    until("the VMM's end", || Ok(rustix::process::test_kill_process(vmm).is_err()))?;
    ensure!(nvme.driver().as_deref() == Some(VFIO), "{:?}", nvme.driver());
    user.nacre(&["rm", "writer"])?.code(0)?;
    before.and_nothing_more(user.state())?;
    is_the_hosts_disk_again(&nvme, "1234\n")
}

fn refused(answer: Answer, text: &str) -> Result<()> {
    answer.code(i32::from(u8::from(RunExit::Device)))?.tells(text)?;
    Ok(())
}

#[test]
fn what_can_t_be_given_is_refused_with_the_reason_and_stays_as_it_was() -> Result<()> {
    let (Some(nvme), Some(grouped)) = (named("nvme"), named("grouped")) else { return Ok(()) };
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let run = |device: &str| user.run(&options(&["--device", device]), &["true"]);
    refused(run("vfio:0000:7f:1f.7,bind")?, "there is no PCI device 0000:7f:1f.7")?;
    refused(run(&format!("vfio:{}", nvme.address))?, "has the driver nvme, not vfio-pci")?;
    // Both functions have the host's driver: it is the other one that stands in the way.
    let other = format!("{}1", grouped.address.trim_end_matches('0'));
    refused(run(&grouped.bound())?, &format!("{other} has the driver virtio-pci"))?;
    ensure!(grouped.driver().as_deref() == Some("virtio-pci"), "{:?}", grouped.driver());
    run("vfio:1")?.code(i32::from(u8::from(RunExit::Usage)))?.tells("PCI address")?;

    let disk = nvme.disk()?;
    let mut start = Vec::new();
    File::open(&disk)?.take(8192).read_to_end(&mut start)?;
    for command in ["mkswap", "swapon"] {
        let status =
            Command::new(command).arg(&disk).stdout(std::process::Stdio::null()).status()?;
        ensure!(status.success(), "{command}");
    }
    let in_use = run(&nvme.bound());
    Command::new("swapoff").arg(&disk).status()?;
    File::options().write(true).open(&disk)?.write_all(&start)?;
    refused(in_use?, "is swap")?;
    ensure!(nvme.driver().as_deref() == Some("nvme"), "{:?}", nvme.driver());
    before.and_nothing_more(user.state())
}

#[test]
fn a_device_that_was_bound_before_stays_bound() -> Result<()> {
    let Some(large) = named("large-bar") else { return Ok(()) };
    let former = large.driver();
    large.give_to(VFIO)?;
    let user = User::new()?;
    let device = format!("vfio:{}", large.address);
    // A BAR of a gigabyte, which the guest sees whole; the second word of a line is its end.
    let script = "for r in /sys/bus/pci/devices/*/resource; do while read start end flags; do \
        test $((end - start + 1)) -ge $((1 << 30)) && echo large; done < $r; done; true";
    user.run(&options(&["--device", &device]), &["sh", "-c", script])?.prints("large\n")?;
    ensure!(large.driver().as_deref() == Some(VFIO), "{:?}", large.driver());
    if former.is_none() {
        fs::write(large.folder().join("driver/unbind"), &large.address)?;
    }
    Ok(())
}
