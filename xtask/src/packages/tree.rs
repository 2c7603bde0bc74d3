//! The package tree of the emulated host: one fixed release of Debian, whatever the machine runs.
//!
//! The tree is packed as the host's root. QEMU and virtiofsd for the machine itself come out of it
//! too, started by the tree's own dynamic loader, so that nothing depends on the machine's QEMU.

use super::apt::PrivateApt;
use super::kernel::Kernel;
use super::machine;
use crate::cache::{Cache, key};
use crate::tool::output;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// To be counted up when what is made here changes.
const FORMAT: &str = "1";
const RELEASE: &str = "trixie";
const PACKAGES: &[&str] = &[
    "busybox-static",
    "ethtool",
    "fio",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libcap-ng0",
    "nftables",
    "procps",
    "qemu-system-x86",
    "qemu-utils",
    "socat",
    "strace",
    "virtiofsd",
];
const LEFT_OUT: &[&str] = &["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*"];
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The tree in the cache.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    image: PathBuf,
}

impl Tree {
    /// The tree with this kernel's modules, made if it is not in the cache yet.
    ///
    /// # Errors
    /// A tool is missing, or the packages cannot be fetched.
    pub fn prepare(cache: &Cache, kernel: &Kernel) -> Result<Self> {
        let recipe = [FORMAT, RELEASE, &PACKAGES.join(","), &kernel.identity()];
        let name = format!("tree-{}", key(&recipe.map(str::as_bytes)));
        let what = "making the emulated host's package tree (about a minute, once)";
        let folder = cache.entry(&name, what, |folder| {
            machine::need(machine::TREE_PACKAGES)?;
            let mirror = PrivateApt::open(cache)?.mirror()?;
            make(folder, kernel, &mirror)
        })?;
        Ok(Self { root: folder.join("root"), image: folder.join("root.erofs") })
    }

    /// The tree packed as a read-only file system.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// A path in the tree, on the machine.
    pub fn path(&self, within: &str) -> PathBuf {
        self.root.join(within)
    }

    /// A program of the tree, to be run on the machine.
    pub fn command(&self, program: &str) -> Command {
        command_in(&self.root, program, program)
    }
}

fn command_in(root: &Path, program: &str, name: &str) -> Command {
    let libraries = root.join(LIBRARIES);
    let mut command = Command::new(root.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&libraries).args(["--argv0", name]);
    command.arg(root.join(program));
    command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
    command
}

fn make(folder: &Path, kernel: &Kernel, mirror: &str) -> Result<()> {
    fs::create_dir_all(folder)?;
    let root = folder.join("root");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--variant=minbase", "--dpkgopt=force-unsafe-io"]);
    mmdebstrap.arg("--aptopt=APT::Install-Recommends \"false\"");
    mmdebstrap.arg("--aptopt=Acquire::Languages \"none\"");
    // The lists are fresh; a machine whose clock runs ahead must not stop the first command.
    mmdebstrap.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    for path in LEFT_OUT {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    mmdebstrap.arg(format!("--include={}", PACKAGES.join(",")));
    output(mmdebstrap.arg(RELEASE).arg(&root).arg(mirror)).context("cannot make the tree")?;

    let modules = root.join("usr/lib/modules").join(kernel.release());
    fs::create_dir_all(root.join("usr/lib/modules"))?;
    output(Command::new("cp").arg("-a").arg(kernel.modules_folder()).arg(&modules))
        .context("cannot copy the kernel's modules")?;
    let mut depmod = command_in(&root, "usr/bin/kmod", "depmod");
    output(depmod.arg("-b").arg(&root).arg(kernel.release()))
        .context("cannot index the modules")?;
    fs::create_dir_all(root.join("host")).context("cannot make the share's mount point")?;
    let image = folder.join("root.erofs");
    output(Command::new("mkfs.erofs").arg("-zlz4").arg(image).arg(root))
        .context("cannot pack the tree")?;
    Ok(())
}
