//! The life of an emulated host that is kept.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nacre_tests::nacre::{SANDBOX_PATIENCE, finish};
use nacre_tests::xtask::{cache, host_up, idle_max_s, xtask};

const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The socket of the host that these tests keep: the youngest, for hosts of other builds leave
/// theirs behind.
fn socket() -> Result<PathBuf> {
    let mut youngest = None;
    for entry in fs::read_dir(cache()?)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let socket = entry.path().join("control");
        if name.starts_with("host-")
            && name.ends_with("-command-tests")
            && let Ok(made) = fs::symlink_metadata(&socket).and_then(|socket| socket.modified())
        {
            youngest = youngest.max(Some((made, socket)));
        }
    }
    Ok(youngest.context("no socket of the kept host")?.1)
}

#[test]
fn a_detached_sandbox_keeps_its_host_up_and_without_it_the_host_ends() -> Result<()> {
    let Some(idle_max_s) = idle_max_s() else {
        println!("SKIPPED: no emulated host is used here");
        return Ok(());
    };
    host_up()?;
    let options = ["run", "--name", "keeper", "--detach", "--", "sleep", "1000"];
    finish(&mut xtask(&options)?)?.code(0)?;
    let socket = socket()?;
    let beyond = Instant::now() + Duration::from_secs(idle_max_s + idle_max_s / 2);
    // A connection that is closed again would count as use: only the server's process is looked at.
    while Instant::now() < beyond {
        ensure!(is_served(&socket)?, "the host ended under a sandbox");
        thread::sleep(LOOK_EVERY);
    }
    let listed = finish(&mut xtask(&["nacre", "--", "ps"])?)?.code(0)?;
    ensure!(listed.out.contains("keeper") && listed.out.contains("running"), "{listed:?}");
    finish(&mut xtask(&["nacre", "--", "rm", "-f", "keeper"])?)?.code(0)?;
    let deadline = Instant::now() + SANDBOX_PATIENCE;
    while is_served(&socket)? {
        ensure!(Instant::now() < deadline, "an idle host does not end");
        thread::sleep(LOOK_EVERY);
    }
    ensure!(UnixStream::connect(&socket).is_err(), "somebody still listens");
    Ok(())
}

/// Whether a process has the socket bound, as the kernel lists it. While others come and go a list
/// may lack one that stays: it has to be missing from several.
fn is_served(socket: &Path) -> Result<bool> {
    let path = socket.display().to_string();
    for _look in 0..3 {
        let listed =
            fs::read_to_string("/proc/net/unix").context("the kernel's list of sockets")?;
        if listed.lines().any(|line| line.ends_with(path.as_str())) {
            return Ok(true);
        }
    }
    Ok(false)
}
