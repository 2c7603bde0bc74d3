//! vCPUs that come and go under a Linux guest, whose own driver does its part. What the agent does in
//! a sandbox, to bring them online, a script does here.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use nacre_proto::exit::VmmExit;
use nacre_tests::artifacts;
use nacre_tests::backend::Backend;
use nacre_tests::control::Control;
use nacre_tests::machine::{Machine, Running};

/// A boot, or what the slowest guest here does, on a host that emulates itself.
const PATIENCE: Duration = Duration::from_secs(240);

/// What every script begins with: to wait for a vCPU, to bring it online, to wait until it is gone,
/// and to show on which one a process of each runs.
const WORDS: &str = "cpus=/sys/devices/system/cpu
comes() { until test -e $cpus/cpu$1; do usleep 50000; done; }
online() { comes $1; echo 1 > $cpus/cpu$1/online; }
goes() { while test -e $cpus/cpu$1; do usleep 50000; done; }
runs_on() { taskset -c $1 cut -d' ' -f39 /proc/self/stat; }
echo ready $(nproc)
";

/// What every script ends with: what the kernel said that it should not.
const COMPLAINTS: &str =
    "echo complaints $(dmesg | grep -ciE 'mismatch|warning:|bug:|firmware bug|call trace|offline failed')
dmesg | grep -iE 'mismatch|warning:|bug:|firmware bug|call trace|offline failed'
";

/// A guest, which has one vCPU for ordinary work at first.
struct Guest {
    running: Running,
    control: Control,
    _backend: Backend,
    _dirs: [tempfile::TempDir; 2],
}

fn backend(dir: &Path, share: &Path) -> Result<Backend> {
    let shared = share.display().to_string();
    Backend::start("nacre-fs", dir, &["--shared-dir", &shared, "--tag", "job"])
}

impl Guest {
    fn start(cpus: [u32; 2], arguments: &str, script: &str) -> Result<Self> {
        let dirs = [tempfile::tempdir()?, tempfile::tempdir()?];
        fs::write(dirs[1].path().join("run.sh"), [WORDS, script, COMPLAINTS].concat())?;
        let backend = backend(dirs[0].path(), dirs[1].path())?;
        let (control, theirs) = Control::new()?;
        let (kernel, initramfs) = (artifacts::kernel()?, artifacts::shell_initramfs()?);
        let cmdline = format!("console=ttyS0 quiet panic=-1 {arguments}");
        let [at_start, at_most] = cpus.map(|cpus| cpus.to_string());
        // The kernel keeps some of it for each vCPU that can come.
        let memory = if cpus[1] > 8 { "1G" } else { "512M" };
        let mut running = Machine::linux(&kernel, &initramfs, &cmdline)?
            .with(&["--cpus", &at_start, "--max-cpus", &at_most, "--memory", memory])
            .device("job", "fs", backend.socket())
            .control(theirs)
            .start()?;
        running.until_within(PATIENCE, "ready 1")?;
        Ok(Self { running, control, _backend: backend, _dirs: dirs })
    }

    fn says(&mut self, line: &str) -> Result<()> {
        self.running.until_within(PATIENCE, line).map(drop)
    }

    fn powers_off(self) -> Result<()> {
        let ended = self.running.wait_for(PATIENCE)?;
        ensure!(ended.ended(VmmExit::PowerOff), "{ended:#?}");
        ensure!(ended.guest.iter().any(|line| line == "complaints 0"), "{ended:#?}");
        Ok(())
    }
}

#[test]
fn vcpus_come_run_processes_go_and_come_again() -> Result<()> {
    let script = "online 1; online 2
echo up $(nproc) on $(runs_on 0) $(runs_on 1) $(runs_on 2)
for cpu in 0 1 2; do cat $cpus/cpu$cpu/topology/physical_package_id; done | uniq | \
    sed 's/^/package /'
goes 1; goes 2
echo down $(nproc)
online 1
echo again $(nproc) on $(runs_on 1)
";
    let mut guest = Guest::start([1, 4], "", script)?;
    guest.control.set_cpus(3)?;
    guest.says("up 3 on 0 1 2")?;
    guest.says("package 0")?;
    let status = guest.control.status()?;
    ensure!((status.cpus, status.max_cpus) == (3, 4), "{status:?}");
    guest.control.set_cpus(1)?;
    guest.control.cpus_become(1)?;
    guest.says("down 1")?;
    ensure!(guest.control.status()?.cpus == 1);
    guest.control.set_cpus(2)?;
    guest.says("again 2 on 1")?;
    guest.powers_off()
}

#[test]
fn a_guest_that_cannot_stop_a_vcpu_keeps_it_and_says_so() -> Result<()> {
    // The kernel stops none if only those would stay that it keeps from ordinary work.
    let script = "until dmesg | grep -q 'Offline failed'; do usleep 50000; done
dmesg -c > /dev/null
echo kept $(cat $cpus/online)
online 2
echo more $(cat $cpus/online)
goes 1
until dmesg | grep -q 'Offline failed'; do usleep 50000; done
dmesg -c > /dev/null
echo now $(cat $cpus/online)
";
    let mut guest = Guest::start([2, 3], "isolcpus=0", script)?;
    guest.control.set_cpus(1)?;
    let reason = guest.control.cpus_declined()?;
    ensure!(reason.contains("keeps vCPU 1: status 0x82"), "{reason}");
    guest.says("kept 0-1")?;
    ensure!(guest.control.status()?.cpus == 2);
    // With another one it gives that up, and then keeps the last one.
    guest.control.set_cpus(3)?;
    guest.says("more 0-2")?;
    guest.control.set_cpus(1)?;
    guest.control.cpus_become(2)?;
    let reason = guest.control.cpus_declined()?;
    ensure!(reason.contains("keeps vCPU 2: status 0x82"), "{reason}");
    guest.says("now 0,2")?;
    ensure!(guest.control.status()?.cpus == 2);
    guest.powers_off()
}

#[test]
fn a_reboot_begins_with_the_vcpus_that_are_there() -> Result<()> {
    let script = "if test -e /job/rebooted; then echo second $(nproc) of $(cat $cpus/present)
else comes 2; touch /job/rebooted; sync; reboot -f; fi
";
    let mut guest = Guest::start([1, 4], "", script)?;
    guest.control.set_cpus(3)?;
    guest.says("ready 3")?;
    guest.says("second 3 of 0-2")?;
    ensure!(guest.control.status()?.cpus == 3);
    guest.powers_off()
}

#[test]
fn a_vcpu_with_an_id_beyond_eight_bits_runs_a_process() -> Result<()> {
    let script = "online 299
echo last on $(runs_on 299) of $(nproc)
sed -n '/^processor.*: 299$/,$s/^apicid.*: /apicid /p' /proc/cpuinfo
goes 299
echo gone
";
    let mut guest = Guest::start([1, 300], "", script)?;
    guest.control.set_cpus(300)?;
    guest.says("last on 299 of 2")?;
    guest.says("apicid 299")?;
    guest.control.set_cpus(299)?;
    guest.control.cpus_become(299)?;
    guest.says("gone")?;
    guest.powers_off()
}
