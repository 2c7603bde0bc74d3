//! The layers with real Linux guests: on the KVM host, and under QEMU on this machine.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::guest_image::{GuestImage, busybox_rootfs};
use crate::host::{Host, devices};
use crate::packages::kernel::Kernel;
use crate::packages::tree::Tree;
use crate::programs::Programs;
use crate::shell_image;
use crate::test::{Tally, build_bare_guest, build_test, count_tests};

const VIRTIOFSD: &str = "usr/libexec/virtiofsd";

/// What a guest needs, as variables for a test program.
fn variables(cache: &Cache, programs: &Programs) -> Result<Vec<(&'static str, PathBuf)>> {
    let guest = GuestImage::prepare(cache, &programs.agent)?;
    let rootfs = busybox_rootfs(cache)?;
    let kernel = Kernel::prepare(cache)?;
    let shell = shell_image::prepare(cache, &kernel, &rootfs)?;
    Ok(vec![
        ("NACRE_KERNEL", guest.kernel),
        ("NACRE_BZIMAGE", kernel.bzimage(cache)?),
        ("NACRE_INITRAMFS", guest.initramfs),
        ("NACRE_SHELL_INITRAMFS", shell),
        ("NACRE_ROOTFS", rootfs),
        ("NACRE_BIN_DIR", programs.folder.clone()),
    ])
}

/// Builds everything and runs the Linux tests on the KVM host.
pub(crate) fn run(root: &Path, filter: &[String], tally: &mut Tally) -> Result<()> {
    let cache = Cache::open()?;
    let programs = Programs::build()?;
    let test = build_test(root, "linux")?;
    let mut command = host_command(&cache, &programs)?;
    // One sandbox at a time: two processors, which may themselves be emulated, are what there is.
    command.arg("--").arg(test).arg("--test-threads=1").args(filter);
    count_tests(&mut command, tally)
}

/// This same program, which knows how to run a command on whichever host there is, with all the
/// variables for a test program; `--` and that program are to follow.
pub(crate) fn host_command(cache: &Cache, programs: &Programs) -> Result<Command> {
    let (tools, virtiofsd) = tools(cache)?;
    let mut command = Command::new(env::current_exe().context("my own program")?);
    command.arg("host").arg("--bind").arg(cache.root());
    for (name, value) in variables(cache, programs)? {
        command.arg("--env").arg(format!("{name}={}", value.display()));
    }
    command.arg("--env").arg(format!("NACRE_TOOLS={}", tools.display()));
    command.arg("--env").arg(format!("NACRE_VIRTIOFSD={virtiofsd}"));
    for (name, value) in passthrough(cache)? {
        command.arg("--env").arg(format!("{name}={value}"));
    }
    Ok(command)
}

/// Which devices tests may give to guests, and what is on the disks among them: the emulated
/// host's, or those that the user names, about whose content nothing is known.
fn passthrough(cache: &Cache) -> Result<Vec<(&'static str, String)>> {
    if Host::is_direct()? {
        let named = env::var(devices::VARIABLE).ok();
        return Ok(named.map(|words| (devices::VARIABLE, words)).into_iter().collect());
    }
    let disk = devices::disk(cache)?.display().to_string();
    Ok(vec![(devices::VARIABLE, devices::names()), (devices::DISK_VARIABLE, disk)])
}

/// A root with fio and its like, and Debian's virtiofsd as words: the emulated host's own, and the
/// same out of the host's package tree where there is no such host.
fn tools(cache: &Cache) -> Result<(PathBuf, String)> {
    if !Host::is_direct()? {
        return Ok((PathBuf::from("/"), format!("/{VIRTIOFSD}")));
    }
    let tree = Tree::prepare(cache, &Kernel::prepare(cache)?)?;
    let virtiofsd = words(&tree.command(VIRTIOFSD)).into_string().ok();
    Ok((tree.path(""), virtiofsd.context("the cache's path is not text")?))
}

/// Builds everything and runs the interoperation tests on this machine.
pub(crate) fn interop(root: &Path, filter: &[String], tally: &mut Tally) -> Result<()> {
    let cache = Cache::open()?;
    let programs = Programs::build()?;
    build_bare_guest(root)?;
    let test = build_test(root, "interop")?;
    let tree = Tree::prepare(&cache, &Kernel::prepare(&cache)?)?;
    let firmware = ["usr/share/qemu", "usr/share/seabios"].map(|folder| tree.path(folder));
    let mut qemu = words(&tree.command("usr/bin/qemu-system-x86_64"));
    for folder in firmware {
        qemu.push(format!(" -L {}", folder.display()));
    }
    let mut command = Command::new(test);
    command.arg("--test-threads=1").args(filter).envs(variables(&cache, &programs)?);
    command.env("NACRE_QEMU", qemu);
    command.env("NACRE_QSD", words(&tree.command("usr/bin/qemu-storage-daemon")));
    command.env("NACRE_VIRTIOFSD", words(&tree.command(VIRTIOFSD)));
    count_tests(&mut command, tally)
}

/// A command as words for another program's variable; no part of it has spaces.
fn words(command: &Command) -> OsString {
    let mut words = command.get_program().to_owned();
    for argument in command.get_args() {
        words.push(" ");
        words.push(argument);
    }
    words
}
