//! Devices of the host's that tests give to guests: which they are, what the host does with them,
//! and how the host uses them itself.
//!
//! On an emulated host they are its own. On a machine with full KVM they are those that its user
//! names in `NACRE_VFIO_DEVICES`, whose disks the tests write to.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process::until;
use crate::sys;

const VARIABLE: &str = "NACRE_VFIO_DEVICES";
const DISK_VARIABLE: &str = "NACRE_VFIO_DISK";
const PCI: &str = "/sys/bus/pci";
/// The driver of a device that can be given to a guest.
pub const VFIO: &str = "vfio-pci";

/// A device of the host's.
#[derive(Clone, Debug)]
pub struct Function {
    /// Where it is.
    pub address: String,
}

/// The device that tests may use as a `kind`; none, with a line that says so, if there is none.
#[must_use]
#[expect(clippy::print_stdout, reason = "a test that can't run here says so in its output")]
pub fn named(kind: &str) -> Option<Function> {
    let words = env::var(VARIABLE).unwrap_or_default();
    let found =
        words.split_whitespace().find_map(|word| word.strip_prefix(kind)?.strip_prefix('='));
    if found.is_none() {
        println!("SKIPPED: {VARIABLE} names no {kind} that may be given to a guest");
    }
    Some(Function { address: found?.to_owned() })
}

/// The file with what is on the NVMe disks at first; on a user's machine nobody knows.
#[must_use]
pub fn disk_content() -> Option<PathBuf> {
    env::var_os(DISK_VARIABLE).map(PathBuf::from)
}

impl Function {
    /// Its folder in sysfs.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        Path::new(PCI).join("devices").join(&self.address)
    }

    /// What `nacre` is told to take it from its driver.
    #[must_use]
    pub fn bound(&self) -> String {
        format!("vfio:{},bind", self.address)
    }

    /// The driver that it has.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.folder().join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Gives it the driver `name`.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not.
    pub fn give_to(&self, name: &str) -> Result<()> {
        if name == VFIO {
            let loaded = Command::new("modprobe").arg(VFIO).status().context("modprobe")?;
            ensure!(loaded.success(), "modprobe {VFIO}: {loaded}");
        }
        fs::write(self.folder().join("driver_override"), format!("{name}\n"))?;
        if self.driver().is_some() {
            fs::write(self.folder().join("driver/unbind"), &self.address)?;
        }
        fs::write(Path::new(PCI).join("drivers_probe"), &self.address)?;
        fs::write(self.folder().join("driver_override"), "\n")?;
        ensure!(self.driver().as_deref() == Some(name), "{} has {:?}", self.address, self.driver());
        Ok(())
    }

    /// The block device that the host's driver makes of an NVMe controller, once it is there.
    ///
    /// # Errors
    ///
    /// Fails if it does not come.
    pub fn disk(&self) -> Result<PathBuf> {
        let mut found = None;
        until("the host's disk", || {
            found = self.disk_now();
            Ok(found.is_some())
        })?;
        found.context("a disk")
    }

    fn disk_now(&self) -> Option<PathBuf> {
        let controller = first(&self.folder().join("nvme"), |_| true)?;
        let name = controller.file_name()?.to_str()?.to_owned();
        let is_disk = |entry: &str| entry.starts_with("nvme") && !entry.contains('c');
        let own = first(&controller, |entry| is_disk(entry) && entry != name);
        // A disk that several controllers may have is below all of them together.
        let shared = || {
            let all = fs::read_dir("/sys/class/nvme-subsystem").ok()?.flatten();
            let of_it = all.map(|entry| entry.path()).find(|path| path.join(&name).exists())?;
            first(&of_it, |entry| is_disk(entry) && entry != name)
        };
        let disk = Path::new("/dev").join(own.or_else(shared)?.file_name()?);
        disk.exists().then_some(disk)
    }

    /// The interface that the host's driver makes of a nic, once it is there.
    ///
    /// # Errors
    ///
    /// Fails if it does not come.
    pub fn interface(&self) -> Result<String> {
        let mut found = None;
        until("the host's interface", || {
            let virtio = first(&self.folder(), |name| name.starts_with("virtio"));
            let net = virtio.unwrap_or_else(|| self.folder()).join("net");
            found = first(&net, |_| true);
            Ok(found.is_some())
        })?;
        let name = found.as_deref().and_then(Path::file_name).context("an interface")?;
        Ok(name.to_string_lossy().into_owned())
    }

    /// Makes one virtual function of an NVMe controller of QEMU's, with two queues and two
    /// interrupts, and switches it on.
    ///
    /// # Errors
    ///
    /// Fails if the controller does not do as QEMU's does.
    pub fn virtual_function(&self) -> Result<Self> {
        let made = self.folder().join("sriov_numvfs");
        let link = self.folder().join("virtfn0");
        if !link.exists() {
            // The host's own driver is not to take it: it has no queues yet.
            fs::write(self.folder().join("sriov_drivers_autoprobe"), "0")?;
            fs::write(&made, "1").context("no virtual function")?;
            let controller = first(&self.folder().join("nvme"), |_| true).context("nvme")?;
            let node = Path::new("/dev").join(controller.file_name().context("a name")?);
            let file = fs::File::options().read(true).write(true).open(node)?;
            // NVMe 1.4, section 5.22: of secondary controller 1, assign 2 interrupts (resource 1)
            // and 3 queues (resource 0), then set it online.
            for (action, resource, count) in [(8, 1, 2), (8, 0, 3), (9, 0, 0)] {
                sys::nvme_virtualization(&file, 1, action, resource, count)
                    .with_context(|| format!("action {action} on resource {resource}"))?;
            }
        }
        let address = fs::read_link(&link).context("virtfn0")?;
        let address = address.file_name().context("an address")?.to_string_lossy().into_owned();
        Ok(Self { address })
    }
}

/// The first entry of a folder whose name fits, in the order of names.
fn first(folder: &Path, fits: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder).ok()?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    let found = entries.iter().find(|entry| entry.file_name().to_str().is_some_and(&fits))?;
    Some(found.path())
}
