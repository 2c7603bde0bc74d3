//! The VMM alone with Debian's kernel, shares and disks served by ours and by others' backends.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::VmmExit;
use nacre_tests::artifacts;
use nacre_tests::backend::Backend;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::machine::{Ended, Machine};
use nacre_tests::nacre::{SANDBOX_PATIENCE, User};
use nacre_tests::process::{Process, until};

/// How many sandboxes are started one after the other.
const BOOTS: usize = 20;

/// A guest of Debian's kernel that runs `script` from the share.
pub(super) fn linux(share: &Path, script: &str) -> Result<Machine> {
    fs::write(share.join("run.sh"), script)?;
    let cmdline = "console=ttyS0 quiet panic=-1";
    Machine::linux(&artifacts::kernel()?, &artifacts::shell_initramfs()?, cmdline)
}

pub(super) fn fs_backend(dir: &Path, share: &Path) -> Result<Backend> {
    let shared = share.display().to_string();
    Backend::start("nacre-fs", dir, &["--shared-dir", &shared, "--tag", "job"])
}

fn powered_off(ended: &Ended, line: &str) -> Result<()> {
    ensure!(ended.ended(VmmExit::PowerOff), "{ended:#?}");
    ensure!(ended.guest.iter().any(|said| said == line), "no {line:?}: {ended:#?}");
    Ok(())
}

#[test]
fn debians_kernel_boots_with_one_and_with_four_processors() -> Result<()> {
    for cpus in ["1", "4"] {
        let (dir, share) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let backend = fs_backend(dir.path(), share.path())?;
        let machine = linux(share.path(), "echo processors $(grep -c ^processor /proc/cpuinfo)\n")?
            .with(&["--cpus", cpus, "--memory", "512M"])
            .device("job", "fs", backend.socket());
        powered_off(&machine.run_for(SANDBOX_PATIENCE)?, &format!("processors {cpus}"))?;
    }
    Ok(())
}

#[test]
fn debians_kernel_boots_as_it_is_shipped() -> Result<()> {
    let (dir, share) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let backend = fs_backend(dir.path(), share.path())?;
    fs::write(share.path().join("run.sh"), "echo booted by $(cat /proc/cmdline)\n")?;
    let cmdline = "console=ttyS0 quiet panic=-1";
    let machine = Machine::linux(&artifacts::bzimage()?, &artifacts::shell_initramfs()?, cmdline)?
        .with(&["--memory", "512M"])
        .device("job", "fs", backend.socket());
    let ended = machine.run_for(SANDBOX_PATIENCE)?;
    powered_off(&ended, &format!("booted by {cmdline}"))
}

#[test]
fn a_reboot_of_the_guest_boots_it_again() -> Result<()> {
    let (dir, share) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let backend = fs_backend(dir.path(), share.path())?;
    let script = "if test -e /job/rebooted; then echo second boot; else \
        touch /job/rebooted; sync; umount /job; reboot -f; fi\n";
    let machine = linux(share.path(), script)?.with(&["--memory", "512M"]).device(
        "job",
        "fs",
        backend.socket(),
    );
    powered_off(&machine.run_for(SANDBOX_PATIENCE)?, "second boot")
}

#[test]
fn a_panic_of_the_guests_kernel_is_told_by_the_exit_code() -> Result<()> {
    let (dir, share) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let backend = fs_backend(dir.path(), share.path())?;
    let machine = linux(share.path(), "echo c > /proc/sysrq-trigger\n")?
        .with(&["--memory", "512M"])
        .device("job", "fs", backend.socket());
    let ended = machine.run_for(SANDBOX_PATIENCE)?;
    ensure!(ended.ended(VmmExit::GuestPanic), "{ended:#?}");
    Ok(())
}

#[test]
fn debians_virtiofsd_serves_a_share() -> Result<()> {
    let (dir, share) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let socket = dir.path().join("virtiofsd.sock");
    let mut command = artifacts::virtiofsd()?;
    let program = command.get_program().to_owned();
    command.args(["--sandbox", "none", "--socket-path"]).arg(&socket);
    command.arg("--shared-dir").arg(share.path()).stdout(Stdio::null());
    let _backend = Process::start(program.as_ref(), &mut command)?;
    until("virtiofsd's socket", || Ok(socket.exists()))?;
    fs::write(share.path().join("from-host"), "salve\n")?;
    // This backend has no configuration space: the supervisor gives it.
    let mut config = b"job".to_vec();
    config.resize(36, 0);
    config.extend(1_u32.to_le_bytes());
    let config: String = config.iter().map(|byte| format!("{byte:02x}")).collect();
    let device = format!("id=job,socket={},type=fs,queues=2,config={config}", socket.display());
    let script = "cat /job/from-host; echo vale > /job/from-guest; sync\n";
    let machine = linux(share.path(), script)?.with(&["--memory", "512M", "--vhost-user", &device]);
    powered_off(&machine.run_for(SANDBOX_PATIENCE)?, "salve")?;
    let answer = fs::read_to_string(share.path().join("from-guest")).context("the guest's file")?;
    ensure!(answer == "vale\n", "{answer:?}");
    Ok(())
}

#[test]
fn twenty_boots_in_a_row_succeed_and_leave_nothing_behind() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    for boot in 0..BOOTS {
        // Four take several times as long as one where processors are emulated.
        let cpus = if boot % 5 == 4 { "4" } else { "1" };
        let line = format!("boot {boot}");
        let answer = user.run(&["--cpus", cpus], &["echo", &line])?;
        answer.prints(&format!("{line}\n")).with_context(|| format!("boot {boot}"))?;
    }
    before.and_nothing_more(user.state())
}
