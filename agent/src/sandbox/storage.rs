//! What is mounted in the guest's own namespace before a container may refer to it.

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use nacre_proto::agent::Storage;
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, unmount},
};
use tokio::task::{JoinError, spawn_blocking};

use crate::{
    ids::ContainerId,
    mounts::{MountError, STATE, make_folder, mount_at},
    sandbox::disks::{self, DiskError, Serial},
};

const STORAGES_MAX: usize = 256;
/// Where the storages of containers are, each in a folder of its own.
const CONTAINERS: &str = "/run/nacre/containers";
/// Where upper and work folders of overlays are, each on a tmpfs of its own.
const SCRATCH: &str = "/run/nacre/scratch";

/// Why a storage can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// Makes no sense.
    #[error("{what} {value:?}")]
    Invalid {
        /// What.
        what: &'static str,
        /// As given.
        value: String,
    },
    /// Too many.
    #[error("{0} storages: at most {STORAGES_MAX} are allowed")]
    TooMany(usize),
    /// Its disk.
    #[error("no disk")]
    Disk(#[from] DiskError),
    /// Its mount.
    #[error("no mount")]
    Mount(#[from] MountError),
    /// Its end.
    #[error("can't unmount it")]
    Unmount(#[source] Errno),
    /// The mount was given up.
    #[error("the mount was cut short")]
    Cut(#[source] JoinError),
    /// Its lower folder.
    #[error("no lower folder {path:?}")]
    Lower {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Driver {
    /// A share of the host, by tag.
    Virtiofs(String),
    /// A disk with a file system.
    Disk { serial: Serial, fs_type: String },
    /// A disk left as a device.
    RawDisk(Serial),
    /// Memory.
    Tmpfs,
    /// Changes in memory over a folder.
    Overlay { lower: PathBuf, scratch: PathBuf },
}

/// A storage, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoragePlan {
    driver: Driver,
    target: PathBuf,
    flags: MountFlags,
    data: Vec<String>,
}

/// Where the storages of one container are, and their scratch.
pub(crate) fn folders(id: &ContainerId) -> [PathBuf; 2] {
    [Path::new(CONTAINERS).join(id), Path::new(SCRATCH).join("containers").join(id)]
}

fn invalid(what: &'static str, value: &str) -> StorageError {
    StorageError::Invalid { what, value: value.to_owned() }
}

impl StoragePlan {
    /// Checks what the host gave for all containers.
    pub(crate) fn parse_all(storages: &[Storage]) -> Result<Vec<Self>, StorageError> {
        Self::parse_below(storages, Path::new(STATE), &Path::new(SCRATCH).join("sandbox"))
    }

    /// Checks what the host gave for one container.
    pub(crate) fn parse_for(
        id: &ContainerId,
        storages: &[Storage],
    ) -> Result<Vec<Self>, StorageError> {
        let [top, scratch] = folders(id);
        Self::parse_below(storages, &top, &scratch)
    }

    fn parse_below(
        storages: &[Storage],
        top: &Path,
        scratch: &Path,
    ) -> Result<Vec<Self>, StorageError> {
        if storages.len() > STORAGES_MAX {
            return Err(StorageError::TooMany(storages.len()));
        }
        let plan = |(index, storage): (usize, &Storage)| {
            let plan = Self::parse(storage, scratch.join(index.to_string()))?;
            if plan.target.as_os_str().is_empty() || plan.target.starts_with(top) {
                Ok(plan)
            } else {
                Err(invalid("no path of the container's own:", &storage.mount_point))
            }
        };
        storages.iter().enumerate().map(plan).collect()
    }

    fn parse(storage: &Storage, scratch: PathBuf) -> Result<Self, StorageError> {
        let driver = match storage.driver.as_str() {
            "virtiofs" if !storage.source.is_empty() => Driver::Virtiofs(storage.source.clone()),
            "blk" if storage.fs_type.is_empty() => Driver::RawDisk(Serial::parse(&storage.source)?),
            "blk" => Driver::Disk {
                serial: Serial::parse(&storage.source)?,
                fs_type: storage.fs_type.clone(),
            },
            "tmpfs" => Driver::Tmpfs,
            "overlay" => Driver::Overlay { lower: below_state(&storage.source)?, scratch },
            other => return Err(invalid("no driver:", other)),
        };
        let target = match &driver {
            Driver::RawDisk(_) if storage.mount_point.is_empty() => PathBuf::new(),
            _ => below_state(&storage.mount_point)?,
        };
        let (flags, data) = options(&storage.options)?;
        Ok(Self { driver, target, flags, data })
    }

    /// Mounts it, when its device is there.
    pub(crate) async fn mount(&self) -> Result<(), StorageError> {
        match &self.driver {
            Driver::Virtiofs(tag) => self.mount_source(tag, "virtiofs").await,
            Driver::Tmpfs => self.mount_source("tmpfs", "tmpfs").await,
            Driver::RawDisk(serial) => Ok(disks::appeared(serial).await.map(drop)?),
            Driver::Disk { serial, fs_type } => {
                let disk = disks::appeared(serial).await?;
                self.mount_source(&disk.node.to_string_lossy(), fs_type).await
            }
            Driver::Overlay { lower, scratch } => self.mount_overlay(lower, scratch),
        }
    }

    /// Where it is mounted.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Unmounts it.
    ///
    /// # Errors
    ///
    /// Fails if it is in use or not mounted.
    pub(crate) fn unmount(&self) -> Result<(), StorageError> {
        unmount(&self.target, UnmountFlags::NOFOLLOW).map_err(StorageError::Unmount)
    }

    /// Mounts away from the service's thread: the device's answers may take their time.
    async fn mount_source(&self, source: &str, fs_type: &str) -> Result<(), StorageError> {
        let (source, fs_type) = (source.to_owned(), fs_type.to_owned());
        let Self { target, flags, data, .. } = self.clone();
        let data = data.join(",");
        let mount = move || mount_at(&source, &target, &fs_type, flags, &data);
        Ok(spawn_blocking(mount).await.map_err(StorageError::Cut)??)
    }

    fn mount_overlay(&self, lower: &Path, scratch: &Path) -> Result<(), StorageError> {
        let lower = lower
            .canonicalize()
            .map_err(|source| StorageError::Lower { path: lower.to_path_buf(), source })?;
        let (size, rest): (Vec<_>, Vec<_>) =
            self.data.iter().cloned().partition(|option| option.starts_with("size="));
        let memory = MountFlags::NODEV;
        mount_at(
            "tmpfs",
            scratch,
            "tmpfs",
            memory,
            &["mode=0755".to_owned()].iter().chain(&size).cloned().collect::<Vec<_>>().join(","),
        )?;
        let (upper, work) = (scratch.join("upper"), scratch.join("work"));
        make_folder(&upper)?;
        make_folder(&work)?;
        let mut data = vec![
            format!("lowerdir={}", lower.display()),
            format!("upperdir={}", upper.display()),
            format!("workdir={}", work.display()),
        ];
        data.extend(rest);
        Ok(mount_at("overlay", &self.target, "overlay", self.flags, &data.join(","))?)
    }
}

/// An absolute path below the agent's state folder, without a way out and without a character that
/// overlayfs takes for a separator.
fn below_state(path: &str) -> Result<PathBuf, StorageError> {
    let plain = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let parsed = PathBuf::from(path);
    let inside = parsed.starts_with(STATE) && parsed != Path::new(STATE);
    if plain && inside && path.len() < 1024 && !path.contains([',', ':', '\\', '\0']) {
        Ok(parsed)
    } else {
        Err(invalid("no path below /run/nacre:", path))
    }
}

fn options(options: &[String]) -> Result<(MountFlags, Vec<String>), StorageError> {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options {
        if option.contains([',', '\0']) || option.len() > 256 {
            return Err(invalid("no mount option:", option));
        }
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "rw" | "" => {}
            _ => data.push(option.clone()),
        }
    }
    Ok((flags, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(driver: &str, source: &str, mount_point: &str) -> Storage {
        Storage {
            driver: driver.to_owned(),
            source: source.to_owned(),
            mount_point: mount_point.to_owned(),
            ..Storage::new()
        }
    }

    #[test]
    fn each_driver_is_understood() {
        let storages = [
            storage("virtiofs", "tag", "/run/nacre/share"),
            storage("blk", "serial", ""),
            storage("tmpfs", "", "/run/nacre/t"),
            storage("overlay", "/run/nacre/share/a", "/run/nacre/root"),
        ];
        let plans = StoragePlan::parse_all(&storages).unwrap();
        assert_eq!(
            plans[3].driver,
            Driver::Overlay {
                lower: PathBuf::from("/run/nacre/share/a"),
                scratch: PathBuf::from("/run/nacre/scratch/sandbox/3"),
            }
        );
    }

    #[test]
    fn mount_points_outside_are_refused() {
        for path in
            ["", "/", "/etc", "/run/nacre", "/run/nacre/../etc", "run/nacre/x", "/run/nacre/a,b"]
        {
            assert!(StoragePlan::parse_all(&[storage("tmpfs", "", path)]).is_err(), "{path:?}");
        }
        assert!(StoragePlan::parse_all(&[storage("nfs", "x", "/run/nacre/x")]).is_err());
    }

    #[test]
    fn a_containers_storages_are_in_its_own_folder() {
        let id = ContainerId::parse("web").unwrap();
        let at = |path: &str| StoragePlan::parse_for(&id, &[storage("tmpfs", "", path)]);
        assert!(at("/run/nacre/containers/web/shm").is_ok());
        assert!(at("/run/nacre/containers/web").is_ok());
        for path in ["/run/nacre/shm", "/run/nacre/containers/db/x", "/run/nacre/containers/web2"] {
            assert!(at(path).is_err(), "{path:?}");
        }
        assert!(StoragePlan::parse_for(&id, &[storage("blk", "serial", "")]).is_ok());
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let given = ["ro", "noexec", "size=1m", "rw"].map(str::to_owned);
        let (flags, data) = options(&given).unwrap();
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOEXEC);
        assert_eq!(data, ["size=1m"]);
        assert!(options(&["a,b".to_owned()]).is_err());
    }
}
