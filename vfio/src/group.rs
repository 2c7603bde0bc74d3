//! The supervisor's half: which IOMMU group a device is in, whether it can be given away, and the
//! three descriptors by which it is.
//!
//! The IOMMU keeps groups apart, not devices: whoever has one device of a group can reach the
//! others' memory. So the kernel gives a group away whole, or not at all; here it is said
//! beforehand which members stand in the way.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;

use crate::address::HostAddress;
use crate::container::{Container, ContainerError};
use crate::sys;

/// The driver that a device has to have to be given away.
pub const DRIVER: &str = "vfio-pci";

/// Drivers of other members with which a group can be given away (Linux, `vfio_dev_viable`).
const HARMLESS_DRIVERS: [&str; 3] = [DRIVER, "pci-stub", "pcieport"];

/// Why a device can't be given away.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// There is no such device.
    #[error("there is no PCI device {0} on this host")]
    NoDevice(HostAddress),
    /// The host has no IOMMU, or does not use it.
    #[error(
        "device {0} is in no IOMMU group: the host has no IOMMU, or it is off \
         (intel_iommu=on, or the firmware's set-up)"
    )]
    NoIommu(HostAddress),
    /// The host itself uses it.
    #[error("device {address} has {}, not {DRIVER}: bind it to {DRIVER} first", driver_of(driver.as_deref()))]
    NotBound {
        /// Which device.
        address: HostAddress,
        /// What it has.
        driver: Option<String>,
    },
    /// The host uses others of the group.
    #[error(
        "device {address} can't be given away alone: {} of the same IOMMU group {group}; bind each \
         to {DRIVER} or take its driver away",
        members(others)
    )]
    NotViable {
        /// Which device.
        address: HostAddress,
        /// Its group.
        group: u32,
        /// Who stands in the way.
        others: Vec<Member>,
    },
    /// sysfs can't be read.
    #[error("can't read {}", path.display())]
    Sysfs {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// This user may not.
    #[error("no permission for {}", path.display())]
    NoPermission {
        /// The group's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody has it.
    #[error("IOMMU group {group} is in use by another process")]
    Busy {
        /// Which group.
        group: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else.
    #[error("can't {action} IOMMU group {group}")]
    Group {
        /// What failed.
        action: &'static str,
        /// Which group.
        group: u32,
        /// Why.
        source: io::Error,
    },
    /// The kernel says that the group can't be given away.
    #[error("the kernel finds IOMMU group {0} not viable: one of its devices has a host driver")]
    Refused(u32),
    /// No container.
    #[error("no container for IOMMU group {group}")]
    Container {
        /// Which group.
        group: u32,
        /// Why.
        source: ContainerError,
    },
    /// No device.
    #[error("the group does not give device {address}")]
    Device {
        /// Which device.
        address: HostAddress,
        /// Why.
        source: io::Error,
    },
}

fn driver_of(driver: Option<&str>) -> String {
    driver.map_or_else(|| "no driver".to_owned(), |driver| format!("the driver {driver}"))
}

fn members(others: &[Member]) -> String {
    let all: Vec<_> = others
        .iter()
        .map(|other| format!("{} has {}", other.address, driver_of(other.driver.as_deref())))
        .collect();
    all.join(", ")
}

/// A device of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub address: HostAddress,
    /// The driver that it has.
    pub driver: Option<String>,
}

/// A group as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub number: u32,
    /// All devices in it, by address.
    pub members: Vec<Member>,
}

/// The three descriptors of a device that is given away: opened and tied together.
#[derive(Debug)]
pub struct Opened {
    /// The address space.
    pub container: OwnedFd,
    /// The group, which is in it.
    pub group: OwnedFd,
    /// The device.
    pub device: OwnedFd,
}

/// `/sys`, or something that looks like it.
#[derive(Clone, Debug)]
pub struct Sysfs(PathBuf);

impl Default for Sysfs {
    fn default() -> Self {
        Self(PathBuf::from("/sys"))
    }
}

impl Sysfs {
    /// Another tree.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self(root.to_owned())
    }

    /// The device's folder.
    #[must_use]
    pub fn device(&self, address: HostAddress) -> PathBuf {
        self.0.join("bus/pci/devices").join(address.to_string())
    }

    /// The driver that a device has.
    ///
    /// # Errors
    ///
    /// Fails if there is no such device, or it can't be read.
    pub fn driver(&self, address: HostAddress) -> Result<Option<String>, GroupError> {
        let device = self.device(address);
        if !device.exists() {
            return Err(GroupError::NoDevice(address));
        }
        link_name(&device.join("driver"))
    }

    /// The group of a device.
    ///
    /// # Errors
    ///
    /// Fails if there is no such device, no IOMMU, or sysfs can't be read.
    pub fn group(&self, address: HostAddress) -> Result<Group, GroupError> {
        let device = self.device(address);
        if !device.exists() {
            return Err(GroupError::NoDevice(address));
        }
        let name = link_name(&device.join("iommu_group"))?;
        let number = name.and_then(|name| name.parse().ok());
        let number = number.ok_or(GroupError::NoIommu(address))?;
        let path = device.join("iommu_group/devices");
        let failed = |source| GroupError::Sysfs { path: path.clone(), source };
        let mut members = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            // What is no PCI device has no driver that could stand in the way.
            let Some(address) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            members.push(Member { address, driver: self.driver(address)? });
        }
        members.sort_by_key(|member| member.address);
        Ok(Group { number, members })
    }
}

/// The last part of what a link points to; none if there is no link.
fn link_name(link: &Path) -> Result<Option<String>, GroupError> {
    match fs::read_link(link) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(GroupError::Sysfs { path: link.to_owned(), source }),
    }
}

impl Group {
    /// Whether `address`, which is in it, can be given away.
    ///
    /// # Errors
    ///
    /// Fails with the members that stand in the way.
    pub fn check(&self, address: HostAddress) -> Result<(), GroupError> {
        let own = self.members.iter().find(|member| member.address == address);
        let own = own.ok_or(GroupError::NoDevice(address))?;
        if own.driver.as_deref() != Some(DRIVER) {
            return Err(GroupError::NotBound { address, driver: own.driver.clone() });
        }
        let in_the_way = |member: &&Member| {
            let driver = member.driver.as_deref();
            driver.is_some_and(|driver| !HARMLESS_DRIVERS.contains(&driver))
        };
        let others: Vec<_> = self.members.iter().filter(in_the_way).cloned().collect();
        if others.is_empty() {
            Ok(())
        } else {
            Err(GroupError::NotViable { address, group: self.number, others })
        }
    }
}

/// Opens a device for being given away: its group in a container of its own, with the IOMMU chosen.
/// Nobody else can open the group as long as one of the descriptors is open; the device is reset
/// by the kernel when the last one is closed.
///
/// # Errors
///
/// Fails with what stands in the way.
pub fn open(sysfs: &Sysfs, address: HostAddress) -> Result<Opened, GroupError> {
    let group = sysfs.group(address)?;
    group.check(address)?;
    let number = group.number;
    let failed = |action| move |source| GroupError::Group { action, group: number, source };
    let no_container = |source| GroupError::Container { group: number, source };
    let container = Container::open().map_err(no_container)?;
    let file = open_file(number)?;
    let flags = sys::group_status(file.as_fd()).map_err(failed("ask after"))?;
    if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(GroupError::Refused(number));
    }
    sys::set_container(file.as_fd(), container.as_fd()).map_err(failed("set the container of"))?;
    container.choose_iommu().map_err(no_container)?;
    let no_device = |source| GroupError::Device { address, source };
    let name = CString::new(address.to_string()).map_err(io::Error::other).map_err(no_device)?;
    let device = sys::open_device(file.as_fd(), &name).map_err(no_device)?;
    Ok(Opened { container: container.into(), group: file.into(), device })
}

fn open_file(group: u32) -> Result<File, GroupError> {
    let path = PathBuf::from(format!("/dev/vfio/{group}"));
    File::options().read(true).write(true).open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => GroupError::NoPermission { path, source },
        io::ErrorKind::ResourceBusy => GroupError::Busy { group, source },
        _ => GroupError::Group { action: "open", group, source },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A tree in which each device of a group has a driver, or none.
    fn tree(devices: &[(&str, u32, Option<&str>)]) -> (TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        for (address, group, driver) in devices {
            let device = root.path().join("bus/pci/devices").join(address);
            let members = root.path().join(format!("kernel/iommu_groups/{group}/devices"));
            fs::create_dir_all(&device).unwrap();
            fs::create_dir_all(&members).unwrap();
            symlink(members.parent().unwrap(), device.join("iommu_group")).unwrap();
            symlink(&device, members.join(address)).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../../drivers/{driver}"), device.join("driver")).unwrap();
            }
        }
        let sysfs = Sysfs::at(root.path());
        (root, sysfs)
    }

    fn address(text: &str) -> HostAddress {
        text.parse().unwrap()
    }

    #[test]
    fn a_device_alone_in_its_group_and_bound_can_be_given_away() {
        let (_root, sysfs) =
            tree(&[("0000:01:00.0", 7, Some(DRIVER)), ("0000:02:00.0", 8, Some("e1000e"))]);
        let group = sysfs.group(address("01:00.0")).unwrap();
        assert_eq!((group.number, group.members.len()), (7, 1));
        group.check(address("01:00.0")).unwrap();
        let error = sysfs.group(address("02:00.0")).unwrap().check(address("02:00.0"));
        let text = error.unwrap_err().to_string();
        assert_eq!(
            text,
            "device 0000:02:00.0 has the driver e1000e, not vfio-pci: bind it to vfio-pci first"
        );
    }

    #[test]
    fn a_group_with_devices_of_the_host_is_refused_with_their_names() {
        let (_root, sysfs) = tree(&[
            ("0000:01:00.0", 7, Some(DRIVER)),
            ("0000:01:00.1", 7, Some("snd_hda_intel")),
            ("0000:01:00.2", 7, None),
            ("0000:01:00.3", 7, Some("xhci_hcd")),
            ("0000:00:01.0", 7, Some("pcieport")),
        ]);
        let group = sysfs.group(address("01:00.0")).unwrap();
        let text = group.check(address("01:00.0")).unwrap_err().to_string();
        assert_eq!(
            text,
            "device 0000:01:00.0 can't be given away alone: 0000:01:00.1 has the driver \
             snd_hda_intel, 0000:01:00.3 has the driver xhci_hcd of the same IOMMU group 7; bind \
             each to vfio-pci or take its driver away"
        );
    }

    #[test]
    fn no_device_and_no_iommu_are_told_apart() {
        let (root, sysfs) = tree(&[("0000:01:00.0", 7, None)]);
        let bare = root.path().join("bus/pci/devices/0000:03:00.0");
        fs::create_dir_all(bare).unwrap();
        let error = sysfs.group(address("03:00.0")).unwrap_err();
        assert!(matches!(error, GroupError::NoIommu(_)), "{error}");
        let error = sysfs.group(address("04:00.0")).unwrap_err();
        assert!(matches!(error, GroupError::NoDevice(_)), "{error}");
        let error = open(&sysfs, address("01:00.0")).unwrap_err();
        assert!(matches!(error, GroupError::NotBound { driver: None, .. }), "{error}");
    }
}
