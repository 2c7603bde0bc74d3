//! What a sandbox boots: the kernel, an initial root with the agent as its first program, and a
//! container root file system of busybox for those who name none.

use crate::cache::{Cache, key};
use crate::cpio::Archive;
use crate::packages::apt::PrivateApt;
use crate::packages::kernel::Kernel;
use crate::tool::output;
use anyhow::{Context, Result};
use std::fs::{self, File, Permissions};
use std::io::BufWriter;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// To be counted up when what is made here changes.
const FORMAT: &str = "1";
/// What the guest needs beyond what is built in (virtio-pci, virtiofs, ext4): disk, network,
/// vsock, the containers' overlay, and the word to the VMM when it panics.
const MODULES: &[&str] =
    &["vmw_vsock_virtio_transport", "virtio_blk", "virtio_net", "overlay", "pvpanic-mmio"];
/// Where the agent finds the modules to load, in order.
const MODULE_LIST: &str = "etc/nacre/modules";
const FOLDERS: &[&str] =
    &["dev", "proc", "sys", "run", "tmp", "etc", "etc/nacre", "lib", "lib/modules"];

const ROOTFS_FOLDERS: &[&str] = &[
    "bin", "dev", "etc", "home", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr",
    "usr/bin", "usr/sbin", "var", "var/log",
];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";
const BUSYBOX: &str = "bin/busybox";

/// A guest in the cache.
#[derive(Debug)]
pub struct GuestImage {
    /// The ELF kernel.
    pub kernel: PathBuf,
    /// The initial root.
    pub initramfs: PathBuf,
}

impl GuestImage {
    /// The guest of this agent, made if it is not in the cache yet.
    ///
    /// # Errors
    /// Packages cannot be fetched, or the agent cannot be read.
    pub fn prepare(cache: &Cache, agent: &Path) -> Result<Self> {
        let kernel = Kernel::prepare(cache)?;
        let program =
            fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
        let recipe = format!("{FORMAT}{MODULES:?}{FOLDERS:?}{}", kernel.identity());
        let name = format!("guest-initramfs-{}", key(&[recipe.as_bytes(), &program]));
        let what = "making the guest's initial root";
        let initramfs = cache.entry(&name, what, |path| make_initramfs(path, &kernel, agent))?;
        cache.prune("guest-initramfs-", &initramfs);
        Ok(Self { kernel: kernel.vmlinux(), initramfs })
    }
}

/// A folder with busybox and little else, made if it is not in the cache yet.
///
/// # Errors
/// The package cannot be fetched, or the cache cannot be written.
pub fn busybox_rootfs(cache: &Cache) -> Result<PathBuf> {
    let recipe = format!("{FORMAT}{ROOTFS_FOLDERS:?}{PASSWD}{GROUP}");
    let name = format!("busybox-rootfs-{}", key(&[recipe.as_bytes()]));
    cache.entry(&name, "making a container root file system of busybox", |root| {
        let unpacked = root.with_extension("package");
        PrivateApt::open(cache)?.unpack("busybox-static", &unpacked)?;
        let made = make_rootfs(root, &unpacked.join(BUSYBOX));
        fs::remove_dir_all(&unpacked)
            .with_context(|| format!("cannot remove {}", unpacked.display()))?;
        made
    })
}

fn make_initramfs(path: &Path, kernel: &Kernel, agent: &Path) -> Result<()> {
    let stripped = path.with_extension("agent");
    output(Command::new("strip").arg("-o").arg(&stripped).arg(agent))
        .context("cannot strip the agent")?;
    let program = fs::read(&stripped).context("cannot read the stripped agent")?;
    fs::remove_file(&stripped).context("cannot remove the stripped agent")?;
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for folder in FOLDERS {
        archive.folder(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, &program)?;
    let mut list = String::new();
    for file in kernel.load_order(MODULES)? {
        let name = file.file_name().context("a module without a name")?.to_string_lossy();
        let place = format!("/lib/modules/{name}");
        let module = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.file(&place, 0o644, &module)?;
        list.push_str(&place);
        list.push('\n');
    }
    archive.file(MODULE_LIST, 0o644, list.as_bytes())?;
    archive.finish()?;
    Ok(())
}

fn make_rootfs(root: &Path, busybox: &Path) -> Result<()> {
    for folder in ROOTFS_FOLDERS {
        let path = root.join(folder);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    fs::set_permissions(root.join("tmp"), Permissions::from_mode(0o1777))?;
    fs::set_permissions(root.join("root"), Permissions::from_mode(0o700))?;
    fs::write(root.join("etc/passwd"), PASSWD)?;
    fs::write(root.join("etc/group"), GROUP)?;
    fs::copy(busybox, root.join(BUSYBOX)).context("the package has no busybox")?;
    let applets = output(Command::new(root.join(BUSYBOX)).arg("--list-full"))
        .context("cannot list busybox's commands")?;
    for applet in applets.lines().filter(|applet| *applet != BUSYBOX) {
        let link = root.join(applet);
        if let Some(folder) = link.parent() {
            fs::create_dir_all(folder)?;
        }
        symlink(Path::new("/").join(BUSYBOX), &link)
            .with_context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(())
}
