//! `cargo xtask` as a user types it, by the program that cargo built.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// `cargo xtask ARGS...`, not yet started; without input.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn xtask<S: AsRef<OsStr>>(args: &[S]) -> Result<Command> {
    let program = env::var_os("NACRE_XTASK").context("no NACRE_XTASK: run cargo xtask test")?;
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    Ok(command)
}

/// How long the emulated host that these tests keep may be idle, in seconds; none where the
/// machine's own KVM serves.
#[must_use]
pub fn idle_max_s() -> Option<u64> {
    env::var("NACRE_HOST_IDLE").ok()?.parse().ok()
}

/// The cache folder.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn cache() -> Result<PathBuf> {
    Ok(env::var_os("NACRE_CACHE").context("no NACRE_CACHE: run cargo xtask test")?.into())
}

/// Boots the emulated host that these tests keep, unless it is up or none is used.
///
/// # Errors
///
/// Fails if it does not come up.
pub fn host_up() -> Result<()> {
    let Some(idle_max_s) = idle_max_s() else { return Ok(()) };
    let mut up = xtask(&["host", "up", "--idle", &idle_max_s.to_string()])?;
    let output = up.output().context("cannot start xtask")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the emulated host does not come up: {said}");
    Ok(())
}
