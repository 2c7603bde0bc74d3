//! What one round does to sandboxes. Each answers with what it did, in a few words.

use std::fs;
use std::time::Duration;
use std::{process, thread};

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::RunExit;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::random::Random;
use crate::artifacts;
use crate::nacre::{Attached, CREATE_STEPS, User, finish};
use crate::process::{children_of, until};

/// Says that it is up, and goes on until it is asked to end.
const STAYS: &str = "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done";
/// How [`STAYS`] ends when it is asked.
const ASKED: i32 = 9;
/// How late after a sandbox's start one of its processes is killed, at most.
const KILL_WITHIN_MS: u32 = 8000;

/// A kind of round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storm {
    /// Sandboxes one after the other.
    Boots,
    /// SIGKILL to a process of a sandbox, at any moment of its life.
    Kill,
    /// Creating a sandbox fails at one of its steps.
    FailedCreate,
    /// fio writes a disk and verifies it.
    Disk,
}

impl Storm {
    /// All kinds; killing is the likeliest.
    pub(super) const ALL: [Self; 5] =
        [Self::Boots, Self::Kill, Self::Kill, Self::FailedCreate, Self::Disk];

    /// Does it.
    ///
    /// # Errors
    ///
    /// Fails if a sandbox does not behave.
    pub(super) fn run(self, user: &User, random: &mut Random) -> Result<String> {
        match self {
            Self::Boots => boots(user, random),
            Self::Kill => kill(user, random),
            Self::FailedCreate => failed_create(user, random),
            Self::Disk => disk(user, random),
        }
    }
}

fn boots(user: &User, random: &mut Random) -> Result<String> {
    let count = 2 + random.below(4);
    for boot in 0..count {
        let cpus = (1 + random.below(4)).to_string();
        let mut options = vec!["--cpus", cpus.as_str()];
        if random.below(2) == 0 {
            options.push("--net");
        }
        let line = format!("boot {boot}");
        let answer = user.run(&options, &["echo", &line])?;
        answer.prints(&format!("{line}\n")).with_context(|| format!("boot {boot}, {options:?}"))?;
    }
    Ok(format!("{count} boots"))
}

fn failed_create(user: &User, random: &mut Random) -> Result<String> {
    let step = *random.one_of(&CREATE_STEPS).context("a step")?;
    let disk = Disk::new()?;
    let mut command = user.run_command(&["--net", "--disk", &disk.path], &["true"])?;
    let answer = finish(command.env("NACRE_FAIL_AT", step))?;
    ensure!(answer.code != Some(0), "it did not fail at {step}: {answer:?}");
    answer.tells(step)?;
    Ok(format!("create failed at {step}"))
}

fn disk(user: &User, random: &mut Random) -> Result<String> {
    let tools = artifacts::tools_root()?.display().to_string();
    let disk = Disk::new()?;
    let block = random.one_of(&["512", "4k", "16k", "128k"]).context("a block size")?;
    let depth = 1 + random.below(32);
    let way = random.one_of(&["randwrite", "write"]).context("a way")?;
    let fio = format!(
        "fio --name=soak --filename=/dev/disk-0 --direct=1 --ioengine=libaio --iodepth={depth} \
         --rw={way} --bs={block} --size=8M --verify=crc32c --do_verify=1 --minimal >/dev/null"
    );
    user.run(&["--rootfs", &tools, "--disk", &disk.path], &["sh", "-c", &fio])?.code(0)?;
    Ok(format!("fio verified {way} of {block} at depth {depth}"))
}

fn kill(user: &User, random: &mut Random) -> Result<String> {
    let disk = Disk::new()?;
    let names = if random.below(2) == 0 { vec!["soak-0"] } else { vec!["soak-0", "soak-1"] };
    let mut runs = Vec::new();
    for name in &names {
        let options = ["--name", name, "--net", "--disk", &format!("{}:ro", disk.path)];
        let command = ["sh", "-c", STAYS];
        runs.push((*name, Attached::start(&mut user.run_command(&options, &command)?)?));
    }
    // At any moment, before or after it is up: this is no wait for something.
    let moment_ms = random.below(KILL_WITHIN_MS);
    thread::sleep(Duration::from_millis(moment_ms.into()));
    let at = usize::try_from(random.below(u32::try_from(runs.len())?))?;
    let (name, mut victim) = runs.swap_remove(at);
    let supervisor = victim.process().id();
    let mut targets = children_of(supervisor)?;
    targets.retain(|(_, program)| program.starts_with("nacre-"));
    let own = i32::try_from(supervisor).ok().and_then(Pid::from_raw).context("a process id")?;
    targets.push((own, "nacre".to_owned()));
    let (pid, program) = random.one_of(&targets).context("a process")?.clone();
    // It may have ended by itself in between.
    kill_process(pid, Signal::KILL).ok();
    let did = format!("{program} of {name} killed after {moment_ms} ms, {} at once", names.len());
    let outcome = match program.as_str() {
        "nacre" => orphaned(user, name, victim),
        "nacre-vmm" => ended(victim, RunExit::VmmDied),
        _ => bereft(user, name, victim),
    };
    let outcome = outcome.with_context(|| did.clone())?;
    for (other, run) in runs {
        run.until("up")?;
        goes_on(user, other, run).with_context(|| format!("{did}: {other}, which lost nothing"))?;
    }
    Ok(format!("{did}: {outcome}"))
}

/// A sandbox without its supervisor ends; what it leaves is removed by name.
fn orphaned(user: &User, name: &str, run: Attached) -> Result<String> {
    let answer = run.wait()?;
    ensure!(answer.code.is_none(), "not killed: {answer:?}");
    until("the sandbox is known as dead, or not at all", || {
        let listed = user.nacre(&["ps"])?.code(0)?;
        Ok(!listed.out.lines().any(|line| line.contains(name) && !line.contains("dead")))
    })?;
    let known = user.nacre(&["ps"])?.code(0)?.out.contains(name);
    if known {
        user.nacre(&["rm", name])?.code(0)?;
    }
    Ok(if known { "removed" } else { "nothing to remove" }.to_owned())
}

/// A sandbox that lost the process of a device goes on, unless that was before the guest's start.
fn bereft(user: &User, name: &str, run: Attached) -> Result<String> {
    if run.until("up").is_err() {
        return ended(run, RunExit::BackendStart);
    }
    goes_on(user, name, run)?;
    Ok("it went on".to_owned())
}

fn ended(run: Attached, exit: RunExit) -> Result<String> {
    let exit = u8::from(exit);
    run.wait()?.code(exit.into())?;
    Ok(format!("ended with {exit}"))
}

/// A sandbox that is up serves, and ends when it is asked.
fn goes_on(user: &User, name: &str, mut run: Attached) -> Result<()> {
    is_whole(user, name)?;
    run.process().terminate()?;
    run.wait()?.code(ASKED)?;
    Ok(())
}

/// Its disk, its network, its files and its agent serve.
fn is_whole(user: &User, name: &str) -> Result<()> {
    let script = "dd if=/dev/disk-0 of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null && \
        ping -c 1 -W 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p') >/dev/null && \
        ls -R / >/dev/null 2>&1; test -e /etc/passwd && echo whole";
    user.nacre(&["exec", name, "sh", "-c", script])?.prints("whole\n")?;
    Ok(())
}

/// A disk image in a folder of its own.
struct Disk {
    path: String,
    _folder: TempDir,
}

impl Disk {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(format!("disk-{}.img", process::id()));
        fs::File::create(&path)?.set_len(16 << 20)?;
        Ok(Self { path: path.display().to_string(), _folder: folder })
    }
}
