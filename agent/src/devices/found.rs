//! Devices of the guest, found by the PCI address that the host knows them by.
//!
//! A device that was added to the running machine is there once the guest's kernel has taken notice,
//! and of use once a driver has: what the driver made is found below the device's folder in sysfs.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nacre_proto::pci::PciAddress;
use tokio::time::sleep;

pub(super) const PCI_DEVICES: &str = "/sys/bus/pci/devices";
/// Disks that several NVMe controllers may have are here and not below one of them.
const NVME_SUBSYSTEMS: &str = "/sys/class/nvme-subsystem";
/// The longest pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How far below a device what its driver made is looked for: an NVMe name space is three below.
const DEPTH: usize = 5;
/// How much of it is looked at.
const MOST: usize = 256;

/// A device that did not come, or that no driver took.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeviceError {
    /// The kernel does not have it.
    #[error("no device appeared at {address} within {} s", limit.as_secs())]
    NotThere {
        /// Where.
        address: PciAddress,
        /// How long it was waited for.
        limit: Duration,
    },
    /// It is there and of no use.
    #[error("no driver made a {} of the device at {address} within {} s", what.join(" or "), limit.as_secs())]
    NotOfUse {
        /// Where.
        address: PciAddress,
        /// What it was to become.
        what: &'static [&'static str],
        /// How long it was waited for.
        limit: Duration,
    },
}

/// Something that a driver made of a device: a disk, an interface, a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// What the kernel counts it among: `block`, `net`, `nvme` and so on.
    pub(crate) subsystem: String,
    /// Its name there, such as `vdb`.
    pub(crate) name: String,
    /// The number of its node, major and minor, if it has one.
    pub(crate) number: Option<(u32, u32)>,
}

/// Waits until a driver has made something of one of `subsystems` out of the device at `address`, and
/// answers all of that kind that it made.
///
/// Looked for again and again: sysfs tells nobody when a driver is through.
///
/// # Errors
///
/// Fails if it is not there within `limit`.
pub(crate) async fn appeared(
    address: PciAddress,
    subsystems: &'static [&'static str],
    limit: Duration,
) -> Result<Vec<Part>, DeviceError> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        let device = folder(Path::new(PCI_DEVICES), address);
        let found = parts(&device, Path::new(NVME_SUBSYSTEMS)).into_iter();
        let found: Vec<Part> = found.filter(|part| is_wanted(part, subsystems)).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(if device.exists() {
                DeviceError::NotOfUse { address, what: subsystems, limit }
            } else {
                DeviceError::NotThere { address, limit }
            });
        }
        sleep(pause).await;
        pause = (pause * 2).min(LOOK_EVERY);
    }
}

fn is_wanted(part: &Part, subsystems: &[&str]) -> bool {
    subsystems.contains(&part.subsystem.as_str())
}

/// What drivers have made of the device at `address` by now.
pub(crate) fn now(address: PciAddress) -> Vec<Part> {
    parts(&folder(Path::new(PCI_DEVICES), address), Path::new(NVME_SUBSYSTEMS))
}

pub(super) fn folder(devices: &Path, address: PciAddress) -> PathBuf {
    devices.join(address.to_string())
}

/// All parts below a device's folder. One that goes while it is looked at is left out.
fn parts(device: &Path, nvme_subsystems: &Path) -> Vec<Part> {
    let mut found = Vec::new();
    let mut open = vec![(device.to_path_buf(), DEPTH)];
    while let Some((folder, depth)) = open.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            // A link leads to another device, or up.
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) || found.len() >= MOST {
                continue;
            }
            let path = entry.path();
            let part = part(&path);
            if part.as_ref().is_some_and(|part| part.subsystem == "nvme") {
                open.extend(shared_disks(nvme_subsystems, &path).map(|folder| (folder, 1)));
            }
            found.extend(part);
            if depth > 1 {
                open.push((path, depth - 1));
            }
        }
    }
    found.sort_by(|a, b| (&a.subsystem, &a.name).cmp(&(&b.subsystem, &b.name)));
    found
}

/// Where an NVMe controller's disks are if other controllers may have them too.
fn shared_disks(nvme_subsystems: &Path, controller: &Path) -> Option<PathBuf> {
    let name = controller.file_name()?;
    let all = fs::read_dir(nvme_subsystems).ok()?.flatten().map(|entry| entry.path());
    all.into_iter().find(|folder| folder.join(name).exists())
}

fn part(path: &Path) -> Option<Part> {
    let subsystem = fs::read_link(path.join("subsystem")).ok()?;
    let subsystem = subsystem.file_name()?.to_string_lossy().into_owned();
    // Part of a disk, and gone with it.
    if path.join("partition").exists() {
        return None;
    }
    // One of the ways to a disk that several controllers have: of no use by itself.
    if fs::read_to_string(path.join("hidden")).is_ok_and(|hidden| hidden.trim() == "1") {
        return None;
    }
    let name = path.file_name()?.to_string_lossy().into_owned();
    let number = fs::read_to_string(path.join("dev")).ok();
    let number = number.and_then(|text| {
        let (major, minor) = text.trim().split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    Some(Part { subsystem, name, number })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A folder of sysfs with a disk behind virtio and a name space behind NVMe.
    fn devices() -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for (path, subsystem, number) in [
            ("0000:00:05.0/virtio3", "virtio", None),
            ("0000:00:05.0/virtio3/block/vdb", "block", Some("254:16\n")),
            ("0000:00:05.0/virtio3/block/vdb/vdb1", "block", Some("254:17\n")),
            ("0000:00:06.0/nvme/nvme0", "nvme", Some("240:0\n")),
            ("0000:00:06.0/nvme/nvme0/nvme0n1", "block", Some("259:0\n")),
            ("0000:00:07.0/virtio4/net/eth7", "net", None),
        ] {
            let folder = top.path().join(path);
            fs::create_dir_all(&folder).unwrap();
            symlink(format!("/sys/class/{subsystem}"), folder.join("subsystem")).unwrap();
            if let Some(number) = number {
                fs::write(folder.join("dev"), number).unwrap();
            }
        }
        fs::write(top.path().join("0000:00:05.0/virtio3/block/vdb/vdb1/partition"), "1").unwrap();
        symlink("../0000:00:06.0", top.path().join("0000:00:05.0/consumer")).unwrap();
        top
    }

    fn found(devices: &tempfile::TempDir, address: &str) -> Vec<(String, String)> {
        let device = folder(devices.path(), address.parse().unwrap());
        let parts = parts(&device, &devices.path().join("subsystems"));
        parts.into_iter().map(|part| (part.subsystem, part.name)).collect()
    }

    #[test]
    fn a_device_s_parts_are_found_and_no_other_s() {
        let devices = devices();
        let pair = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
        let disk = [pair("block", "vdb"), pair("virtio", "virtio3")];
        assert_eq!(found(&devices, "0000:00:05.0"), disk);
        let nvme = [pair("block", "nvme0n1"), pair("nvme", "nvme0")];
        assert_eq!(found(&devices, "0000:00:06.0"), nvme);
        assert!(found(&devices, "0000:00:07.0").contains(&pair("net", "eth7")));
        assert!(found(&devices, "0000:00:08.0").is_empty());
        let parts = parts(&devices.path().join("0000:00:06.0"), Path::new("/none"));
        assert_eq!(parts[0].number, Some((259, 0)));
    }

    #[test]
    fn a_disk_that_several_controllers_have_is_found_once() {
        let devices = devices();
        let disk = devices.path().join("0000:00:06.0/nvme/nvme0/nvme0n1");
        fs::write(disk.join("hidden"), "1\n").unwrap();
        let subsystem = devices.path().join("subsystems/nvme-subsys0");
        fs::create_dir_all(subsystem.join("nvme0n2")).unwrap();
        symlink("/sys/class/block", subsystem.join("nvme0n2/subsystem")).unwrap();
        symlink(disk.parent().unwrap(), subsystem.join("nvme0")).unwrap();
        let pair = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
        let nvme = [pair("block", "nvme0n2"), pair("nvme", "nvme0")];
        assert_eq!(found(&devices, "0000:00:06.0"), nvme);
    }

    #[tokio::test]
    async fn what_does_not_come_is_told_in_time() {
        let address = "ffff:ff:1f.7".parse().unwrap();
        let limit = Duration::from_millis(20);
        let error = appeared(address, &["block"], limit).await.unwrap_err();
        assert_eq!(error, DeviceError::NotThere { address, limit });
    }
}
