//! The ways in which a sandbox ends before its container wants to.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nacre_proto::exit::RunExit;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Attached, User, finish};
use nacre_tests::process::{Process, Signal, await_child_of, until};
use rustix::process::{Pid, kill_process};

#[test]
fn signals_reach_the_container_and_a_second_interrupt_ends_it() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let script = "trap 'echo hup' HUP; trap 'echo int' INT; echo up; while :; do sleep 0.1; done";
    let mut run = Attached::start(&mut user.run_command(&[], &["sh", "-c", script])?)?;
    run.until("up")?;
    run.process().signal(Signal::HUP)?;
    run.until("hup")?;
    run.process().signal(Signal::INT)?;
    run.until("int")?;
    run.process().signal(Signal::INT)?;
    run.wait()?.code(128 + 9)?;
    before.and_nothing_more(user.state())
}

#[test]
fn input_that_the_container_does_not_want_holds_nothing_up() -> Result<()> {
    let user = User::new()?;
    let mut endless = Command::new("yes");
    let mut endless = Process::start("yes".as_ref(), endless.stdout(Stdio::piped()))?;
    let script = "read line; echo got $line; exec 0<&-; sleep 1; echo done";
    let mut run = user.run_command(&["-i"], &["sh", "-c", script])?;
    run.stdin(endless.child().stdout.take().context("standard output")?);
    finish(&mut run)?.prints("got y\ndone\n")?;
    Ok(())
}

/// The child of process `parent` that has `word` among its arguments.
fn child_with(parent: u32, word: &str) -> Result<Pid> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    for pid in children.split_whitespace() {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        if arguments.split('\0').any(|argument| argument == word) {
            return Pid::from_raw(pid.parse()?).context("a process");
        }
    }
    bail!("no child with {word} in {children}")
}

#[test]
fn a_guest_that_cannot_write_back_is_told_by_a_code_of_its_own() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let folder = tempfile::tempdir()?;
    let volume = format!("{}:/data", folder.path().display());
    let options = ["-i", "-v", &volume, "--agent-timeout", "30"];
    let script = "echo x > /data/x; echo up; read line; exit 0";
    let mut command = user.run_command(&options, &["sh", "-c", script])?;
    let mut run = Attached::start(command.stdin(Stdio::piped()))?;
    run.until("up")?;
    // The guest's kernel syncs its file systems, and this one does not answer any more.
    kill_process(child_with(run.process().id(), "volume-0")?, Signal::STOP)?;
    drop(run.process().child().stdin.take());
    let answer = run.wait()?.code(i32::from(u8::from(RunExit::NotWritten)))?;
    answer.tells(
        "nacre: error: the guest did not write everything back, so what the container wrote to \
         disks and volumes may be lost: it did not get on for 3",
    )?;
    before.and_nothing_more(user.state())
}

#[test]
fn output_that_nobody_reads_ends_the_container() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    // It goes on after its pipe is broken, for as long as it is let.
    let script = "yes 2>/dev/null; echo broken >&2; while :; do sleep 0.1; done";
    let run = Attached::start(&mut user.run_command(&[], &["sh", "-c", script])?)?;
    run.until("y")?;
    run.leave()?.code(128 + 9)?.tells("broken")?;
    before.and_nothing_more(user.state())
}

#[test]
fn what_a_killed_supervisor_leaves_is_cleaned_up_by_rm_and_by_the_next_of_its_name() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let options = ["--name", "orphan", "--net"];
    for clean in ["rm", "run"] {
        let mut command = user.run_command(&options, &["sleep", "1000"])?;
        let mut run = Attached::start(&mut command)?;
        let id = run.process().id();
        await_child_of(id, "nacre-vmm")?;
        run.process().signal(Signal::KILL)?;
        ensure!(run.wait()?.code.is_none(), "not killed");
        until("no process is left", || Ok(!any_backend()?))?;
        let listed = user.nacre(&["ps"])?.code(0)?;
        ensure!(listed.out.contains("dead"), "{listed:?}");
        if clean == "rm" {
            user.nacre(&["rm", "orphan"])?.code(0)?;
        } else {
            user.run(&options, &["echo", "again"])?.prints("again\n")?;
        }
        before.and_nothing_more(user.state()).with_context(|| format!("after {clean}"))?;
    }
    Ok(())
}

fn any_backend() -> Result<bool> {
    for entry in fs::read_dir("/proc")? {
        let name = fs::read_to_string(entry?.path().join("comm")).unwrap_or_default();
        if name.starts_with("nacre-") && !name.starts_with("nacre-host") {
            return Ok(true);
        }
    }
    Ok(false)
}
