//! A guest for tests: busybox as its first program runs a script from the share called `job`.
//! Without such a share it sleeps for ever, which is what a silent agent looks like.

use crate::cache::{Cache, key};
use crate::cpio::Archive;
use crate::packages::kernel::Kernel;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

const MODULES: &[&str] = &["virtio_blk", "virtio_net", "pvpanic-mmio"];

const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /lib/modules/*; do insmod $module; done
mkdir -p /job
if mount -t virtiofs job /job; then
    sh /job/run.sh
    sync
    poweroff -f
fi
while :; do sleep 1000; done
";

/// The initial root, made if it is not in the cache yet.
///
/// # Errors
/// The cache cannot be written, or the root file system holds no busybox.
pub fn prepare(cache: &Cache, kernel: &Kernel, busybox_rootfs: &Path) -> Result<PathBuf> {
    let recipe = format!("{INIT}{MODULES:?}{}", kernel.identity());
    let name = format!("shell-initramfs-{}", key(&[recipe.as_bytes()]));
    cache.entry(&name, "making a test guest's initial root", |path| {
        make(path, kernel, &busybox_rootfs.join("bin/busybox"))
    })
}

fn make(path: &Path, kernel: &Kernel, busybox: &Path) -> Result<()> {
    let program = fs::read(busybox).with_context(|| format!("no {}", busybox.display()))?;
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for folder in ["bin", "dev", "proc", "sys", "lib", "lib/modules"] {
        archive.folder(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &program)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    for (order, file) in (0_u32..).zip(kernel.load_order(MODULES)?) {
        let name = file.file_name().context("a module without a name")?.to_string_lossy();
        let module = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.file(&format!("lib/modules/{order:03}-{name}"), 0o644, &module)?;
    }
    archive.finish()?;
    Ok(())
}
