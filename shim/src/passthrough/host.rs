//! Where the host tells of its devices: `/sys` and `/proc`, or folders that look like them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use vfio::{HostAddress, Sysfs};

use crate::passthrough::PassthroughError;

/// A host's `/sys` and `/proc`.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

impl Host {
    /// For the crate that knows groups.
    #[must_use]
    pub fn sysfs(&self) -> Sysfs {
        Sysfs::at(&self.root.join("sys"))
    }

    /// The folder of a device.
    pub(super) fn device(&self, address: HostAddress) -> PathBuf {
        self.sysfs().device(address)
    }

    /// The folder of a driver.
    pub(super) fn driver(&self, name: &str) -> PathBuf {
        self.root.join("sys/bus/pci/drivers").join(name)
    }

    /// Where a device is offered to all drivers.
    pub(super) fn probe(&self) -> PathBuf {
        self.root.join("sys/bus/pci/drivers_probe")
    }

    /// A file below `/proc`; nothing where it can't be read.
    pub(super) fn proc(&self, name: &str) -> String {
        fs::read_to_string(self.root.join("proc").join(name)).unwrap_or_default()
    }

    /// Has the kernel load a driver's module, where it is not loaded.
    pub(super) fn load(&self, driver: &str) {
        if self.driver(driver).exists() || self.root != Path::new("/") {
            return;
        }
        match Command::new("modprobe").arg(driver).output() {
            Ok(output) if output.status.success() => log::info!("loaded the module {driver}"),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                log::debug!("modprobe {driver}: {}", said.trim());
            }
            Err(error) => log::debug!("modprobe: {error}"),
        }
    }
}

/// Writes one word to a file of sysfs.
pub(super) fn write(path: &Path, text: &str) -> Result<(), PassthroughError> {
    let failed = |source: io::Error| PassthroughError::Write {
        text: text.trim_end().to_owned(),
        path: path.to_owned(),
        source,
    };
    fs::write(path, text).map_err(failed)
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A host in which each device of a group has a driver, or none.
    pub(in crate::passthrough) fn tree(devices: &[(&str, u32, Option<&str>)]) -> (TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let sys = root.path().join("sys");
        for (address, group, driver) in devices {
            let device = sys.join("bus/pci/devices").join(address);
            let members = sys.join(format!("kernel/iommu_groups/{group}/devices"));
            fs::create_dir_all(&device).unwrap();
            fs::create_dir_all(&members).unwrap();
            symlink(members.parent().unwrap(), device.join("iommu_group")).unwrap();
            symlink(&device, members.join(address)).unwrap();
            fs::write(device.join("driver_override"), "(null)\n").unwrap();
            if let Some(driver) = driver {
                let folder = sys.join("bus/pci/drivers").join(driver);
                fs::create_dir_all(&folder).unwrap();
                symlink(folder, device.join("driver")).unwrap();
            }
        }
        let host = Host { root: root.path().to_owned() };
        (root, host)
    }
}
