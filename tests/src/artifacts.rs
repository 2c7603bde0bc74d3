//! Where the built programs are: beside the test's own executable, or in `NACRE_BIN_DIR`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The folder with `nacre-vmm`, `nacre-blk` and the others.
///
/// # Errors
///
/// Fails if the test's own place can't be told.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("NACRE_BIN_DIR") {
        return Ok(dir.into());
    }
    let test = env::current_exe().context("the test's own path")?;
    let deps = test.parent().and_then(Path::parent).context("a test outside a target folder")?;
    Ok(deps.to_owned())
}

/// One built program.
///
/// # Errors
///
/// Fails if it is not there: `cargo xtask test` builds it.
pub fn program(name: &str) -> Result<PathBuf> {
    existing(bin_dir()?.join(name))
}

/// The ELF of the guest without a kernel.
///
/// # Errors
///
/// Fails if it is not there: `cargo xtask test bare` builds it.
pub fn bare_guest() -> Result<PathBuf> {
    if let Some(path) = env::var_os("NACRE_BARE_GUEST") {
        return existing(path.into());
    }
    let target = bin_dir()?;
    let target = target.parent().context("a target folder")?;
    existing(target.join("bare-guest/x86_64-unknown-linux-gnu/debug/bare-guest"))
}

/// The guest's kernel, Debian's own.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn kernel() -> Result<PathBuf> {
    given("NACRE_KERNEL")
}

/// The same kernel as Debian ships it, packed.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn bzimage() -> Result<PathBuf> {
    given("NACRE_BZIMAGE")
}

/// An initramfs whose init mounts the share `job` and runs `run.sh` there with busybox; without
/// such a share it sleeps.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn shell_initramfs() -> Result<PathBuf> {
    given("NACRE_SHELL_INITRAMFS")
}

/// The root file system made of busybox.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn busybox_rootfs() -> Result<PathBuf> {
    given("NACRE_ROOTFS")
}

/// The root of a Debian system with the programs that tests run in a guest, such as fio.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn tools_root() -> Result<PathBuf> {
    given("NACRE_TOOLS")
}

/// The folder with containerd's programs out of several releases of Debian, each in a folder of the
/// release's name, and with network plugins in `cni`.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn containerd() -> Result<PathBuf> {
    given("NACRE_CONTAINERD")
}

/// Debian's own virtiofsd.
///
/// # Errors
///
/// Fails outside `cargo xtask test`.
pub fn virtiofsd() -> Result<Command> {
    let words = env::var("NACRE_VIRTIOFSD").context("no NACRE_VIRTIOFSD: run cargo xtask test")?;
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().context("NACRE_VIRTIOFSD is empty")?);
    command.args(words);
    Ok(command)
}

fn given(variable: &str) -> Result<PathBuf> {
    let path =
        env::var_os(variable).with_context(|| format!("no {variable}: run cargo xtask test"))?;
    existing(path.into())
}

fn existing(path: PathBuf) -> Result<PathBuf> {
    ensure!(path.exists(), "{} is not there; `cargo xtask test` builds it", path.display());
    Ok(path)
}
