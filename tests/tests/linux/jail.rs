//! What the processes of a running sandbox may still do: the jail, as the kernel tells of it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nacre_tests::nacre::{Attached, User};
use nacre_tests::process::await_child_of;

/// The capabilities that act on files, which nacre-fs keeps: CHOWN, DAC_OVERRIDE, FOWNER, FSETID,
/// SETGID, SETUID, MKNOD, SETFCAP.
const FILE_CAPABILITIES: u64 = 0x8800_00db;

#[test]
fn every_process_of_a_sandbox_is_jailed_in_all_its_threads() -> Result<()> {
    let user = User::new()?;
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let disk = disk.display().to_string();
    let options = ["--net", "--disk", &disk];
    let mut run = Attached::start(&mut user.run_command(&options, &["sh", "-c", "echo up; cat"])?)?;
    run.until("up")?;
    let supervisor = run.process().id();
    for name in ["nacre-vmm", "nacre-fs", "nacre-vsock", "nacre-blk", "nacre-net"] {
        let pid = await_child_of(supervisor, name)?.as_raw_nonzero();
        let threads = fs::read_dir(format!("/proc/{pid}/task"))?;
        for thread in threads {
            check(&thread?.path(), name).with_context(|| name.to_owned())?;
        }
    }
    Ok(())
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
