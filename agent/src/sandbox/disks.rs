//! Disks, found by the serial number that the host gave them.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::{container::spec::DiskNode, sys};

const BLOCK_DEVICES: &str = "/sys/block";
/// How long a disk may take to appear after the host attached it.
const APPEAR_LIMIT: Duration = Duration::from_secs(10);
const DISKS_MAX: usize = 64;
/// virtio-blk has no longer serials (virtio 1.3, 5.2.6.1: VIRTIO_BLK_ID_BYTES).
const SERIAL_BYTES_MAX: usize = 20;

/// Why a disk can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// It did not appear.
    #[error("no disk with the serial {serial:?} appeared within {} s", APPEAR_LIMIT.as_secs())]
    NoDisk {
        /// Which.
        serial: String,
    },
    /// A serial that no disk has, or a path that is none.
    #[error("{what} {value:?}")]
    Invalid {
        /// What.
        what: &'static str,
        /// As given.
        value: String,
    },
    /// Too many.
    #[error("{0} disks: at most {DISKS_MAX} are allowed")]
    TooMany(usize),
    /// The kernel's own files.
    #[error("can't use {path:?}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A disk's serial number, as virtio-blk reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Serial(String);

impl Serial {
    /// Checks what the host gave.
    pub(crate) fn parse(serial: &str) -> Result<Self, DiskError> {
        let printable = serial.bytes().all(|byte| byte.is_ascii_graphic());
        if serial.is_empty() || serial.len() > SERIAL_BYTES_MAX || !printable {
            return Err(DiskError::Invalid {
                what: "no serial of a disk:",
                value: serial.to_owned(),
            });
        }
        Ok(Self(serial.to_owned()))
    }
}

/// A disk that is to be a device node of a container.
#[derive(Clone, Debug)]
pub(crate) struct DiskRequest {
    serial: Serial,
    path: PathBuf,
    read_only: bool,
}

impl DiskRequest {
    /// Checks what the host gave.
    pub(crate) fn parse(serial: &str, path: &str, read_only: bool) -> Result<Self, DiskError> {
        let serial = Serial::parse(serial)?;
        let path = PathBuf::from(path);
        let plain = path.components().all(|part| part.as_os_str() != "..");
        if path.is_absolute() && plain && path != Path::new("/") {
            Ok(Self { serial, path, read_only })
        } else {
            let value = path.to_string_lossy().into_owned();
            Err(DiskError::Invalid { what: "no absolute path of a device:", value })
        }
    }
}

/// A block device that is there.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// Its node in the agent's /dev.
    pub(crate) node: PathBuf,
    major: u32,
    minor: u32,
}

/// Waits until all disks are there.
pub(crate) async fn nodes(requests: &[DiskRequest]) -> Result<Vec<DiskNode>, DiskError> {
    if requests.len() > DISKS_MAX {
        return Err(DiskError::TooMany(requests.len()));
    }
    let mut nodes = Vec::with_capacity(requests.len());
    for request in requests {
        let disk = appeared(&request.serial).await?;
        nodes.push(DiskNode {
            path: request.path.clone(),
            major: disk.major,
            minor: disk.minor,
            read_only: request.read_only,
        });
    }
    Ok(nodes)
}

/// Waits until a disk is there.
///
/// Looked for again and again: the attribute is filled in by the driver after the device's event.
pub(crate) async fn appeared(serial: &Serial) -> Result<Disk, DiskError> {
    let deadline = Instant::now() + APPEAR_LIMIT;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(disk) = find(Path::new(BLOCK_DEVICES), serial)? {
            return Ok(disk);
        }
        if Instant::now() > deadline {
            return Err(DiskError::NoDisk { serial: serial.0.clone() });
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Makes the disk behind a node refuse writes.
pub(crate) fn set_read_only(node: &DiskNode) -> Result<(), DiskError> {
    let name = fs::read_link(format!("/sys/dev/block/{}:{}", node.major, node.minor));
    let failed = |source| DiskError::File { path: node.path.clone(), source };
    let name = name.map_err(failed)?;
    let name = name.file_name().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let path = Path::new("/dev").join(name);
    let failed = |source| DiskError::File { path: path.clone(), source };
    let disk = File::open(&path).map_err(failed)?;
    sys::set_disk_read_only(&disk).map_err(failed)
}

fn find(devices: &Path, serial: &Serial) -> Result<Option<Disk>, DiskError> {
    let entries = match fs::read_dir(devices) {
        Ok(entries) => entries,
        Err(source) => return Err(DiskError::File { path: devices.to_path_buf(), source }),
    };
    for entry in entries.flatten() {
        // Devices without a serial, and those that are just going, are not it.
        let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end_matches(['\n', '\0']) == serial.0 {
            return number(&entry.path()).map(Some);
        }
    }
    Ok(None)
}

fn number(device: &Path) -> Result<Disk, DiskError> {
    let path = device.join("dev");
    let text = fs::read_to_string(&path)
        .map_err(|source| DiskError::File { path: path.clone(), source })?;
    let parsed = text
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = parsed
        .ok_or_else(|| DiskError::Invalid { what: "no device number:", value: text.clone() })?;
    let name = device.file_name().unwrap_or_default();
    Ok(Disk { node: Path::new("/dev").join(name), major, minor })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial() {
        let folder = tempfile::tempdir().unwrap();
        for (name, serial, number) in [("vda", "root", "254:0\n"), ("vdb", "data", "254:16\n")] {
            let device = folder.path().join(name);
            fs::create_dir(&device).unwrap();
            fs::write(device.join("serial"), serial).unwrap();
            fs::write(device.join("dev"), number).unwrap();
        }
        fs::create_dir(folder.path().join("loop0")).unwrap();
        let disk = find(folder.path(), &Serial::parse("data").unwrap()).unwrap().unwrap();
        assert_eq!(disk.node, Path::new("/dev/vdb"));
        assert_eq!((disk.major, disk.minor), (254, 16));
        assert!(find(folder.path(), &Serial::parse("dat").unwrap()).unwrap().is_none());
    }

    #[test]
    fn odd_serials_and_paths_are_refused() {
        assert!(Serial::parse("").is_err());
        assert!(Serial::parse("a b").is_err());
        assert!(Serial::parse(&"x".repeat(21)).is_err());
        assert!(DiskRequest::parse("d", "/dev/../etc", false).is_err());
        assert!(DiskRequest::parse("d", "dev/x", false).is_err());
        assert!(DiskRequest::parse("d", "/dev/x", true).is_ok());
    }
}
