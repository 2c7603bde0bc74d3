//! Failure at every step and in every part: one clear line, a code, and nothing left behind.

use std::fs;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::RunExit;
use nacre_tests::artifacts;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Answer, CREATE_STEPS, EATER, User, finish};
use nacre_tests::process::{Process, kill_child_of};

#[test]
fn a_guest_panic_has_its_own_code() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    // Nothing in it: so early, the guest can't tell the VMM, and only its console shows it.
    let empty = tempfile::NamedTempFile::new()?;
    fs::write(empty.path(), [0; 512])?;
    let path = empty.path().display().to_string();
    let answer = user.run(&["--initramfs", &path], &["true"])?;
    has_panicked(answer, "the guest's kernel panicked: not syncing: VFS: Unable to mount root")?;
    let options = ["--kernel-args", "sysctl.vm.panic_on_oom=2", "--memory-limit", "32M"];
    let answer = user.run(&options, EATER)?;
    has_panicked(answer, "the guest's kernel panicked: not syncing: Out of memory")?;
    before.and_nothing_more(user.state())
}

fn has_panicked(answer: Answer, line: &str) -> Result<()> {
    let answer = answer.code(i32::from(u8::from(RunExit::GuestPanic)))?;
    let told = answer.said.lines().filter(|said| said.contains(line)).count();
    ensure!(told == 1, "not once {line:?}: {answer:#?}");
    Ok(())
}

#[test]
fn a_guest_that_leaves_by_itself_has_its_own_code() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let shell = artifacts::shell_initramfs()?.display().to_string();
    for (how, tells) in [("poweroff", "powered itself off"), ("reboot", "reset itself")] {
        let words = format!("rdinit=/bin/busybox -- {how} -f");
        let answer = user.run(&["--initramfs", &shell, "--kernel-args", &words], &["true"])?;
        answer.code(i32::from(u8::from(RunExit::GuestLeft)))?.tells(tells)?;
    }
    before.and_nothing_more(user.state())
}

#[test]
fn failure_at_every_step_of_create_leaves_nothing_behind() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let disk = disk.display().to_string();
    for step in CREATE_STEPS {
        let mut command = user.run_command(&["--net", "--disk", &disk], &["true"])?;
        let answer = finish(command.env("NACRE_FAIL_AT", step))?;
        ensure!(answer.code != Some(0), "{step}: {answer:?}");
        answer.tells(step)?;
        before.and_nothing_more(user.state()).with_context(|| format!("after {step}"))?;
    }
    Ok(())
}

#[test]
fn the_death_of_the_vmm_has_its_own_code() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let mut command =
        user.run_command(&["--name", "victim"], &["sh", "-c", "echo up; sleep 1000"])?;
    let program = command.get_program().to_owned();
    let running = Process::start(program.as_ref(), command.stdout(std::process::Stdio::piped()))?;
    kill_child_of(running.id(), "nacre-vmm")?;
    let (status, said) = running.wait()?;
    ensure!(status.code() == Some(i32::from(u8::from(RunExit::VmmDied))), "{status}: {said}");
    before.and_nothing_more(user.state())
}

#[test]
fn sigterm_ends_the_container_and_then_the_sandbox() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let script = "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done";
    let mut command = user.run_command(&[], &["sh", "-c", script])?;
    let program = command.get_program().to_owned();
    let mut running =
        Process::start(program.as_ref(), command.stdout(std::process::Stdio::piped()))?;
    let mut out = running.child().stdout.take().context("standard output")?;
    std::io::Read::read_exact(&mut out, &mut [0; 3])?;
    running.terminate()?;
    let (status, said) = running.wait()?;
    ensure!(status.code() == Some(7), "{status}: {said}");
    before.and_nothing_more(user.state())
}
