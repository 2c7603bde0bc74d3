//! Our disk under QEMU, killed while a Linux guest uses it. QEMU connects anew by itself, and keeps a
//! region in which is marked what is in flight.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_tests::artifacts;
use nacre_tests::backend::Backend;
use nacre_tests::nacre::SANDBOX_PATIENCE;
use nacre_tests::process::{Process, Signal};

/// How often the backend is killed.
const KILLS: u32 = 10;
const DISK_BYTES: u64 = 16 << 20;
const MEMORY: &str = "256M";

/// Writes, reads and compares without a pause; says how many rounds were made.
const SCRIPT: &str = "#!/bin/sh
mkdir -p /tmp
i=0
while [ ! -e /job/enough ]; do
    i=$((i + 1))
    dd if=/dev/urandom of=/tmp/new bs=64k count=16 2>/dev/null
    at=$((i % 8 * 16))
    dd if=/tmp/new of=/dev/vda bs=64k seek=$at conv=fsync 2>/dev/null ||
        echo \"round $i: cannot write\" >> /job/errors
    echo 3 > /proc/sys/vm/drop_caches
    dd if=/dev/vda of=/tmp/old bs=64k skip=$at count=16 2>/dev/null ||
        echo \"round $i: cannot read\" >> /job/errors
    cmp /tmp/new /tmp/old || echo \"round $i: differs\" >> /job/errors
    echo $i > /job/count
    mv /job/count /job/rounds
done
dmesg | grep -i 'i/o error\\|timed out\\|hung\\|call trace\\|nobody cared' >> /job/errors
echo done > /job/result
";

fn qemu(dir: &Path, sockets: [&Path; 2]) -> Result<Process> {
    let words = env::var("NACRE_QEMU").context("NACRE_QEMU: run `cargo xtask test interop`")?;
    let mut words = words.split_whitespace();
    let program = PathBuf::from(words.next().context("NACRE_QEMU is empty")?);
    let mut command = Command::new(&program);
    command.args(words);
    command.args(["-accel", "tcg,thread=multi", "-M", "q35,memory-backend=ram", "-cpu", "max"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    let memory = format!("memory-backend-memfd,id=ram,size={MEMORY},share=on");
    command.args(["-m", MEMORY, "-object", &memory]);
    command.arg("-kernel").arg(artifacts::kernel()?);
    command.arg("-initrd").arg(artifacts::shell_initramfs()?);
    command.args(["-append", "console=ttyS0 quiet panic=-1"]);
    command.args(["-serial", &format!("file:{}", dir.join("serial").display())]);
    let [share, disk] = sockets.map(Path::display);
    for chardev in [
        format!("socket,id=share,path={share}"),
        format!("socket,id=disk,path={disk},reconnect-ms=10"),
    ] {
        command.args(["-chardev", &chardev]);
    }
    command.args(["-device", "vhost-user-fs-pci,chardev=share,tag=job"]);
    command.args(["-device", "vhost-user-blk-pci,chardev=disk"]);
    Process::start(&program, command.stdout(Stdio::null()))
}

fn rounds(job: &Path) -> u32 {
    let said = fs::read_to_string(job.join("rounds")).unwrap_or_default();
    said.trim().parse().unwrap_or(0)
}

/// Waits until the guest has made another round; QEMU has to live meanwhile.
fn another_round(job: &Path, serial: &Path, qemu: &mut Process) -> Result<()> {
    let (before, deadline) = (rounds(job), Instant::now() + SANDBOX_PATIENCE);
    while rounds(job) == before {
        let is_late = Instant::now() > deadline;
        if is_late || !qemu.is_running()? {
            let errors = fs::read_to_string(job.join("errors")).unwrap_or_default();
            let said = fs::read_to_string(serial).unwrap_or_default();
            bail!("no round after {before}; {errors}; the guest said {said}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_guest_of_qemu_notices_nothing_of_a_disk_that_is_killed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (job, image) = (dir.path().join("job"), dir.path().join("disk.img"));
    fs::create_dir(&job)?;
    fs::write(job.join("run.sh"), SCRIPT)?;
    fs::File::create(&image)?.set_len(DISK_BYTES)?;
    let text = |path: &Path| path.display().to_string();
    let share = ["--shared-dir", &text(&job), "--tag", "job"];
    let share = Backend::start("nacre-fs", dir.path(), &share)?;
    let disk = ["--disk", &text(&image), "--lock-wait", "60"];
    let mut disk = Backend::start("nacre-blk", dir.path(), &disk)?;
    let mut qemu = qemu(dir.path(), [share.socket(), disk.socket()])?;
    let serial = dir.path().join("serial");
    another_round(&job, &serial, &mut qemu)?;
    for kill in 0..KILLS {
        // Each at another moment of a round.
        thread::sleep(Duration::from_millis(u64::from(kill) * 37));
        disk = disk.replace(Signal::KILL)?;
        another_round(&job, &serial, &mut qemu)?;
    }
    fs::write(job.join("enough"), "")?;
    let (status, said) = qemu.wait_for(SANDBOX_PATIENCE)?;
    ensure!(status.success(), "{status}: {said}");
    let errors = fs::read_to_string(job.join("errors")).unwrap_or_default();
    ensure!(errors.is_empty(), "{errors}");
    ensure!(job.join("result").exists(), "{said}");
    Ok(())
}
