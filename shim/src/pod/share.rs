//! A pod's share: the folder that its one `nacre-fs` serves, and what is mounted in it while there
//! is a container that needs it.
//!
//! ```text
//!   SHARED/                 a mount of its own, and a shared one: what is mounted in it comes to
//!     CONTAINER/            every nacre-fs that runs
//!       rootfs              the container's root
//!       volumes/N           what is bound into it, a folder or a file
//! ```
//!
//! Each is a copy of the host's mount in which nothing is a device or a program or changes who runs
//! it, made before it is mounted here, so that no `nacre-fs` ever sees it otherwise.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, FileTypeExt},
    },
    path::{Path, PathBuf},
    sync::Mutex,
};

use rustix::{
    fs::CWD,
    mount::{
        MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_bind,
        mount_change, move_mount, open_tree, unmount,
    },
};

use crate::{
    plan,
    pod::spec::{Bind, Kind},
    sys,
};

/// Something can't be put into the share.
#[derive(Debug, thiserror::Error)]
#[error("{} can't be shared with the guest", path.display())]
pub struct ShareError {
    path: PathBuf,
    source: io::Error,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Share {
    folder: PathBuf,
    /// How often each id was used: a guest may remember the folder of an earlier one. Locked for map
    /// operations only.
    used: Mutex<BTreeMap<String, u32>>,
}

/// The folder of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Folder {
    name: String,
}

impl Folder {
    /// Its name in the share.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// As the guest sees it.
    pub(super) fn in_guest(&self) -> String {
        format!("{}/{}", plan::guest_pod(), self.name)
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> ShareError {
    move |source| ShareError { path: path.to_owned(), source }
}

fn errno(path: &Path) -> impl Fn(rustix::io::Errno) -> ShareError {
    move |error| failed(path)(error.into())
}

impl Share {
    /// Makes the folder.
    pub(super) fn make(folder: PathBuf) -> Result<Self, ShareError> {
        DirBuilder::new().mode(0o755).create(&folder).map_err(failed(&folder))?;
        mount_bind(&folder, &folder).map_err(errno(&folder))?;
        // Not with whatever mount of the host's it was a copy of.
        for kind in [MountPropagationFlags::PRIVATE, MountPropagationFlags::SHARED] {
            mount_change(&folder, kind).map_err(errno(&folder))?;
        }
        Ok(Self { folder, used: Mutex::default() })
    }

    /// A folder for the container `id`; no other one ever has the same.
    pub(super) fn reserve(&self, id: &str) -> Folder {
        let mut used = self.used.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let times = used.entry(id.to_owned()).or_default();
        *times += 1;
        // No id has a tilde.
        let name = if *times == 1 { id.to_owned() } else { format!("{id}~{times}") };
        Folder { name }
    }

    /// Mounts what a container needs. If that fails, nothing is left.
    pub(super) fn fill(
        &self,
        folder: &Folder,
        rootfs: &Path,
        binds: &[Bind],
    ) -> Result<(), ShareError> {
        let place = self.folder.join(&folder.name);
        let filled = fill(&place, rootfs, binds);
        if filled.is_err() {
            self.empty(folder);
        }
        filled
    }

    /// Unmounts what a container had. What its guest still has open lives as long as that.
    pub(super) fn empty(&self, folder: &Folder) {
        let place = self.folder.join(&folder.name);
        let volumes = place.join("volumes");
        let listed = fs::read_dir(&volumes).into_iter().flatten().flatten();
        let mut points: Vec<PathBuf> = listed.map(|entry| entry.path()).collect();
        points.push(place.join("rootfs"));
        for point in &points {
            match unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                Err(error) => log::warn!("{} stays mounted: {error}", point.display()),
            }
        }
        // Never what is mounted: an empty folder or file, or it stays.
        let removed = points.iter().try_for_each(|point| {
            if point.is_dir() { fs::remove_dir(point) } else { fs::remove_file(point) }
        });
        let removed = removed.and_then(|()| fs::remove_dir(&volumes));
        if let Err(error) = removed.and_then(|()| fs::remove_dir(&place)) {
            log::debug!("{} stays: {error}", place.display());
        }
    }
}

fn fill(place: &Path, rootfs: &Path, binds: &[Bind]) -> Result<(), ShareError> {
    let volumes = place.join("volumes");
    DirBuilder::new().recursive(true).mode(0o755).create(&volumes).map_err(failed(&volumes))?;
    let root = Bind {
        from: rootfs.to_owned(),
        is_folder: true,
        is_whole: true,
        read_only: false,
        follows: false,
    };
    put(&root, &place.join("rootfs"))?;
    let mut binds = binds.iter().enumerate();
    binds.try_for_each(|(number, bind)| put(bind, &volumes.join(number.to_string())))
}

/// Mounts a copy at `point`, which is made.
fn put(bind: &Bind, point: &Path) -> Result<(), ShareError> {
    let from = &bind.from;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if bind.is_whole {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let copy = open_tree(CWD, from, flags).map_err(errno(from))?;
    let hard = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let attributes = hard | if bind.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let kind = if bind.follows {
        MountPropagationFlags::DOWNSTREAM
    } else {
        MountPropagationFlags::PRIVATE
    };
    sys::restrict_mount(copy.as_fd(), attributes, kind.bits().into()).map_err(failed(from))?;
    let made = if bind.is_folder {
        DirBuilder::new().mode(0o755).create(point)
    } else {
        File::create_new(point).map(drop)
    };
    made.map_err(failed(point))?;
    move_mount(&copy, "", CWD, point, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(errno(point))
}

/// What is at a path of the host.
pub(super) fn look(path: &Path) -> io::Result<Kind> {
    let kind = fs::metadata(path)?.file_type();
    Ok(match () {
        () if kind.is_dir() => Kind::Folder,
        () if kind.is_block_device() => Kind::Disk,
        () => Kind::File,
    })
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
