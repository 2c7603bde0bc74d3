//! What the host holds all processes of a sandbox to: its cgroup there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::RunExit;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Attached, User, finish};
use nacre_tests::process::{Signal, await_child_of, until};

const ROOT: &str = "/sys/fs/cgroup";

/// Whether this host has cgroup v2; says so if not.
#[expect(clippy::print_stdout, reason = "a test that can't run here says so")]
fn has_cgroups() -> bool {
    let has = Path::new(ROOT).join("cgroup.controllers").exists();
    if !has {
        println!("SKIPPED: this host has no cgroup v2");
    }
    has
}

/// The folder of the cgroup that a process is in.
fn cgroup_of(pid: impl std::fmt::Display) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(Path::new(ROOT).join(path.context("no cgroup v2")?))
}

/// A field of the cgroup's `cpu.stat`.
fn cpu_stat(cgroup: &Path, field: &str) -> Result<u64> {
    let text = fs::read_to_string(cgroup.join("cpu.stat"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("no {field} in {text}"))?.parse()?)
}

#[test]
fn every_process_of_a_sandbox_is_in_its_cgroup_and_held_to_its_limits() -> Result<()> {
    if !has_cgroups() {
        return Ok(());
    }
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let options = [
        ["--name", "limited"],
        ["--host-memory-limit", "700M"],
        ["--host-pids-limit", "200"],
        ["--host-cpu-limit", "0.5"],
    ];
    let busy = ["sh", "-c", "echo up; while :; do :; done"];
    let mut run = Attached::start(&mut user.run_command(&options.concat(), &busy)?)?;
    run.until("up")?;
    let supervisor = run.process().id();
    let cgroup = cgroup_of(await_child_of(supervisor, "nacre-vmm")?.as_raw_nonzero())?;
    let name = cgroup.file_name().unwrap_or_default().to_string_lossy().into_owned();
    ensure!(cgroup.parent() == Some(&Path::new(ROOT).join("nacre")), "{}", cgroup.display());
    ensure!(name.starts_with(&format!("limited-{supervisor}-")), "{name}");
    for program in ["nacre-fs", "nacre-vsock"] {
        let pid = await_child_of(supervisor, program)?.as_raw_nonzero();
        ensure!(cgroup_of(pid)? == cgroup, "{program} is elsewhere");
    }
    ensure!(cgroup_of(supervisor)? != cgroup, "the supervisor is held to its sandbox's limits");
    for (file, value) in
        [("memory.max", "734003200"), ("pids.max", "200"), ("cpu.max", "50000 100000")]
    {
        let found = fs::read_to_string(cgroup.join(file))?;
        ensure!(found.trim() == value, "{file} is {found}");
    }
    // All of the guest's memory that was touched is charged to it: a kernel has booted.
    let charged: u64 = fs::read_to_string(cgroup.join("memory.current"))?.trim().parse()?;
    ensure!(charged > 32 << 20, "{charged} bytes");
    // A guest that wants a whole processor gets half of one.
    let (begun, used_us) = (Instant::now(), cpu_stat(&cgroup, "usage_usec")?);
    let throttled = cpu_stat(&cgroup, "nr_throttled")?;
    until("throttled", || Ok(cpu_stat(&cgroup, "nr_throttled")? >= throttled + 20))?;
    let used_us = cpu_stat(&cgroup, "usage_usec")? - used_us;
    let wall_us = begun.elapsed().as_micros();
    ensure!(u128::from(used_us) * 10 < wall_us * 7, "{used_us} of {wall_us} us");
    for _twice in 0..2 {
        run.process().signal(Signal::TERM)?;
    }
    run.wait()?.code(128 + 9)?;
    before.and_nothing_more(user.state())
}

#[test]
fn a_sandbox_beyond_its_memory_on_the_host_is_ended_and_told_why() -> Result<()> {
    if !has_cgroups() {
        return Ok(());
    }
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    // The root file system is written in the guest's memory, which the host gives page by page.
    let eat = ["dd", "if=/dev/zero", "of=/x", "bs=1M", "count=350"];
    let options = ["--memory", "768M", "--host-memory-limit", "200M"];
    let answer = user.run(&options, &eat)?;
    let codes = [RunExit::VmmDied, RunExit::BackendDied].map(|exit| i32::from(u8::from(exit)));
    ensure!(answer.code.is_some_and(|code| codes.contains(&code)), "{answer:#?}");
    answer.tells("signal 9")?.tells("nacre: error: the host's memory limit was reached")?;
    before.and_nothing_more(user.state())
}

#[test]
fn without_cgroup_v2_limits_of_the_host_are_refused_with_one_warning() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let run = user.run_command(&["--host-memory-limit", "700M"], &["echo", "hello"])?;
    // A machine whose cgroups are hidden from what runs there.
    let mut hidden = Command::new("unshare");
    let script = "umount -l /sys/fs/cgroup; exec \"$@\"";
    hidden.args(["--mount", "sh", "-c", script, "sh"]).arg(run.get_program()).args(run.get_args());
    let answer = finish(hidden.env("NACRE_STATE", user.state()).stdin(Stdio::null()))?;
    let answer = answer.prints("hello\n")?;
    let warning = "nacre: warn: limits on the host are refused: this machine has no cgroup v2 at \
                   /sys/fs/cgroup (limits in the guest hold)\n";
    ensure!(answer.said == warning, "{answer:#?}");
    before.and_nothing_more(user.state())
}
