//! What the processes of a running sandbox may still do: the jail, as the kernel tells of it.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nacre_tests::nacre::{Attached, User};
use nacre_tests::process::{Process, await_child_of, until};

/// The capabilities that act on files, which nacre-fs keeps: CHOWN, DAC_OVERRIDE, FOWNER, FSETID,
/// SETGID, SETUID, MKNOD, SETFCAP.
const FILE_CAPABILITIES: u64 = 0x8800_00db;

/// All programs of a sandbox with a disk and a network.
const PROGRAMS: [&str; 5] = ["nacre-vmm", "nacre-fs", "nacre-vsock", "nacre-blk", "nacre-net"];

/// A sandbox that runs until it is dropped.
fn start(user: &User, folder: &Path) -> Result<Attached> {
    let disk = folder.join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let options = ["--net", "--disk", &disk.display().to_string()];
    let command = ["sh", "-c", "echo up; sleep 1000"];
    let run = Attached::start(&mut user.run_command(&options, &command)?)?;
    run.until("up")?;
    Ok(run)
}

#[test]
fn every_process_of_a_sandbox_is_jailed_in_all_its_threads() -> Result<()> {
    let user = User::new()?;
    let folder = tempfile::tempdir()?;
    let mut run = start(&user, folder.path())?;
    let supervisor = run.process().id();
    for name in PROGRAMS {
        let pid = await_child_of(supervisor, name)?.as_raw_nonzero();
        let mut threads = 0;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            check(&thread?.path(), name).with_context(|| name.to_owned())?;
            threads += 1;
        }
        // The VMM has a thread for its loop, its vCPU and its watchdog; a backend for protocol,
        // signals and each group of queues.
        ensure!(threads >= 2, "{name} has {threads} threads");
    }
    Ok(())
}

/// A root without the capabilities that open every process (Linux takes any of these three for
/// it), but with all others, which a process under the jail has not more of.
const ORDINARY: [&str; 2] = ["--bounding-set", "-sys_ptrace,-sys_admin,-perfmon"];

/// Whether a program of the same user can look into process `pid`.
fn can_be_looked_into(pid: impl Display) -> Result<bool> {
    let mut look = Command::new("setpriv");
    look.args(ORDINARY).args(["cat", &format!("/proc/{pid}/environ")]);
    Ok(look.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success())
}

#[test]
fn no_process_of_a_sandbox_can_be_looked_into_by_its_user() -> Result<()> {
    let user = User::new()?;
    let folder = tempfile::tempdir()?;
    let mut run = start(&user, folder.path())?;
    let supervisor = run.process().id();
    for name in PROGRAMS {
        let pid = await_child_of(supervisor, name)?.as_raw_nonzero();
        ensure!(!can_be_looked_into(pid)?, "{name} is dumpable");
    }
    // A process that did nothing against it, to see that it is that which makes the difference.
    let mut other = Command::new("setpriv");
    other.args(ORDINARY).args(["sleep", "1000"]);
    let other = Process::start("setpriv".as_ref(), &mut other)?;
    until("a process that can be looked into", || can_be_looked_into(other.id()))
}

/// One thread: a seccomp filter, no privileges to gain, no capabilities to use or to get.
fn check(thread: &Path, name: &str) -> Result<()> {
    let status = fs::read_to_string(thread.join("status"))?;
    let field = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.map(str::trim).with_context(|| format!("no {key} in {status}"))
    };
    ensure!(field("Seccomp")? == "2", "{name}: no filter: {status}");
    ensure!(field("NoNewPrivs")? == "1", "{name}: privileges can be gained: {status}");
    let allowed = if name == "nacre-fs" { FILE_CAPABILITIES } else { 0 };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let held = u64::from_str_radix(field(set)?, 16)?;
        ensure!(held & !allowed == 0, "{name}: {set} is {held:#x}");
    }
    Ok(())
}
