//! The emulated host's initial root: busybox, the modules that its root and KVM need, a script.

use crate::cache::{Cache, key};
use crate::cpio::Archive;
use crate::packages::kernel::Kernel;
use crate::packages::tree::Tree;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const INIT: &str = include_str!("init.sh");
/// What the root file system needs.
const ROOT_MODULES: &[&str] = &["virtio_blk", "crc32c-intel", "erofs", "overlay"];
/// Loaded while the root is mounted; everything else the kernel asks modprobe for.
const LATER_MODULES: &[&str] = &["kvm-amd", "virtio_net"];
const FOLDERS: &[&str] = &[
    "bin",
    "dev",
    "proc",
    "sys",
    "lower",
    "upper",
    "root",
    "modules",
    "modules/root",
    "modules/later",
];

/// The archive's path, made if it is not in the cache yet.
///
/// # Errors
/// The kernel lacks a module, or the cache cannot be written.
pub(super) fn prepare(cache: &Cache, kernel: &Kernel, tree: &Tree) -> Result<PathBuf> {
    let lists = format!("{ROOT_MODULES:?}{LATER_MODULES:?}{FOLDERS:?}");
    let parts = [INIT, &lists, &kernel.identity()];
    let name = format!("host-initramfs-{}", key(&parts.map(str::as_bytes)));
    cache.entry(&name, "making the emulated host's initial root", |path| make(path, kernel, tree))
}

fn make(path: &Path, kernel: &Kernel, tree: &Tree) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for folder in FOLDERS {
        archive.folder(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    let busybox = tree.path("usr/bin/busybox");
    let program =
        fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    archive.file("bin/busybox", 0o755, &program)?;
    let root = kernel.load_order(ROOT_MODULES)?;
    let later = kernel.load_order(LATER_MODULES)?;
    add_modules(&mut archive, "root", root.iter())?;
    add_modules(&mut archive, "later", later.iter().filter(|file| !root.contains(file)))?;
    archive.finish()?;
    Ok(())
}

/// Adds modules under names that sort in the order they are loaded in.
fn add_modules<'a>(
    archive: &mut Archive<impl Write>,
    group: &str,
    files: impl Iterator<Item = &'a PathBuf>,
) -> Result<()> {
    for (index, file) in files.enumerate() {
        let name = file.file_name().context("a module without a name")?.to_string_lossy();
        let module = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.file(&format!("modules/{group}/{index:02}-{name}"), 0o644, &module)?;
    }
    Ok(())
}
