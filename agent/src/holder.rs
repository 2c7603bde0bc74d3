//! The PID namespace that a sandbox's containers share when none of them lends its own.
//!
//! A PID namespace lives as long as its first process. Here that is the agent's own program, which
//! executes nothing, reads nothing and waits: the kernel reaps for it. It keeps the agent's
//! capabilities and is not dumpable, so that no container that has fewer gets at it by /proc.

use std::{
    io,
    os::unix::process::CommandExt,
    process::{Command, ExitCode, Stdio},
    thread,
};

use rustix::{
    process::{DumpableBehavior, Pid, set_dumpable_behavior},
    thread::UnshareFlags,
};

use crate::{
    process::{
        reap::{FollowError, Reaper},
        state::Live,
    },
    sys,
};

/// The argument of the first process.
pub(crate) const MODE: &str = "hold";

/// Why there is no such namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HolderError {
    /// Its first process could not be started.
    #[error("can't start the first process of a PID namespace")]
    Spawn(#[source] io::Error),
    /// Its first process can't be followed.
    #[error("can't follow the first process of a PID namespace")]
    Follow(#[from] FollowError),
    /// It has ended.
    #[error("the first process of the shared PID namespace has ended")]
    Ended,
}

/// Waits for ever, as the first process of a PID namespace.
pub(crate) fn run() -> ExitCode {
    let ready = set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .and_then(|()| sys::let_kernel_reap());
    if let Err(error) = ready {
        log::error!("can't hold a PID namespace: {error}");
        return ExitCode::FAILURE;
    }
    loop {
        // May return for no reason.
        thread::park();
    }
}

/// Makes a PID namespace.
pub(crate) fn make(reaper: &Reaper) -> Result<Live, HolderError> {
    let launching = reaper.launching();
    // For what this thread starts from now on, and only this: so it is one that ends.
    let pid = thread::spawn(spawn).join();
    let pid = pid.map_err(|_panic| HolderError::Spawn(io::Error::other("the thread panicked")))?;
    let (live, _end) = launching.follow(pid.map_err(HolderError::Spawn)?)?;
    live.ok_or(HolderError::Ended)
}

fn spawn() -> io::Result<Pid> {
    sys::unshare(UnshareFlags::NEWPID)?;
    let child = Command::new("/proc/self/exe")
        .arg0("nacre-pause")
        .arg(MODE)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    // The reaper waits for it, as for every child.
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("a process number out of range"))
}
