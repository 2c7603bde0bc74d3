//! The agent's own mount namespace: what it consists of before any container exists.

use std::{
    ffi::CString,
    fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::statfs,
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
        mount_move, mount_remount, unmount,
    },
    process::{chdir, chroot},
};

/// Where everything that the agent makes lives.
pub(crate) const STATE: &str = "/run/nacre";

const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// Where the initial root is bound for a moment.
const BOUND_ROOT: &str = "/.root";

/// Why the mount namespace could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// A folder could not be made.
    #[error("can't make the folder {path:?}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file system could not be mounted.
    #[error("can't mount {fs_type} on {target:?}")]
    Mount {
        /// Which.
        fs_type: String,
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The root could not be changed.
    #[error("can't {step} the root")]
    Root {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Mount data with a zero byte.
    #[error("mount data has a zero byte")]
    Data,
}

/// One file system of the table.
struct Entry {
    fs_type: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const NO_CODE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const NO_DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

const PROC: Entry = Entry { fs_type: "proc", target: "/proc", flags: NO_CODE, data: "" };
const SYS: Entry = Entry { fs_type: "sysfs", target: "/sys", flags: NO_CODE, data: "" };
const RUN: Entry = Entry { fs_type: "tmpfs", target: "/run", flags: NO_DEVICES, data: "mode=0755" };
const CGROUP: Entry =
    Entry { fs_type: "cgroup2", target: "/sys/fs/cgroup", flags: NO_CODE, data: "" };

const GUEST: [Entry; 8] = [
    PROC,
    SYS,
    Entry { fs_type: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, data: "mode=0755" },
    Entry {
        fs_type: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: "gid=5,mode=0620,ptmxmode=0666",
    },
    Entry { fs_type: "tmpfs", target: "/dev/shm", flags: NO_DEVICES, data: "mode=1777" },
    RUN,
    Entry { fs_type: "tmpfs", target: "/tmp", flags: NO_DEVICES, data: "mode=1777" },
    CGROUP,
];

/// What differs from the machine around, in namespaces on a machine that is up already.
const NAMESPACES: [Entry; 4] = [PROC, SYS, RUN, CGROUP];

/// Mounts everything that a guest needs, after making its root one that can be pivoted away from.
pub(crate) fn set_up_guest() -> Result<(), MountError> {
    make_root_pivotable()?;
    mount_all(&GUEST)
}

/// Cuts the mount namespace off from the machine's and mounts what is to be private.
pub(crate) fn set_up_namespaces() -> Result<(), MountError> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|source| MountError::Root { step: "privatise", source })?;
    mount_all(&NAMESPACES)
}

/// Makes the guest's root read-only: all that changes is below /run, /tmp and /dev.
///
/// The agent's executable lies there, and a container's root may get hold of it by /proc/N/exe.
pub(crate) fn seal_root() -> Result<(), MountError> {
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "")
        .map_err(|source| MountError::Root { step: "seal", source })
}

/// Makes a folder and those above it.
pub(crate) fn make_folder(path: &Path) -> Result<(), MountError> {
    fs::create_dir_all(path)
        .map_err(|source| MountError::Folder { path: path.to_path_buf(), source })
}

/// Mounts one file system on a folder that is made if need be.
pub(crate) fn mount_at(
    source: &str,
    target: &Path,
    fs_type: &str,
    flags: MountFlags,
    data: &str,
) -> Result<(), MountError> {
    make_folder(target)?;
    let data = CString::new(data).map_err(|_error| MountError::Data)?;
    mount(source, target, fs_type, flags, data.as_c_str()).map_err(|source| MountError::Mount {
        fs_type: fs_type.to_owned(),
        target: target.to_path_buf(),
        source,
    })
}

fn mount_all(table: &[Entry]) -> Result<(), MountError> {
    for entry in table {
        let target = Path::new(entry.target);
        match mount_at(entry.fs_type, target, entry.fs_type, entry.flags, entry.data) {
            // Mounted already, by the kernel itself.
            Err(MountError::Mount { source: Errno::BUSY, .. }) => {}
            other => other?,
        }
    }
    make_folder(Path::new(STATE))
}

/// Binds the initial root over itself.
///
/// The kernel unpacks an initramfs into a file system that has no parent mount, and `pivot_root`
/// refuses to leave such a root (pivot_root(2), EINVAL). A bind mount of it, moved onto `/`, has the
/// same files and a parent; nothing is copied.
fn make_root_pivotable() -> Result<(), MountError> {
    let failed = |step| move |source| MountError::Root { step, source };
    let kind = statfs("/").map_err(failed("examine"))?.f_type.cast_unsigned();
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Ok(());
    }
    make_folder(Path::new(BOUND_ROOT))?;
    mount_bind("/", BOUND_ROOT).map_err(failed("bind"))?;
    chdir(BOUND_ROOT).map_err(failed("enter"))?;
    mount_move(".", "/").map_err(failed("move"))?;
    chroot(".").map_err(failed("change"))?;
    chdir("/").map_err(failed("enter"))
}

/// Mount points below `folder`, in the order in which they were mounted (proc(5), mountinfo).
pub(crate) fn mounted_below<'a>(table: &'a str, folder: &str) -> std::vec::IntoIter<&'a str> {
    let below =
        |target: &&str| target.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    let targets: Vec<_> =
        table.lines().filter_map(|line| line.split(' ').nth(4)).filter(below).collect();
    targets.into_iter()
}

/// Unmounts everything in `folder`, the last first, and removes the folders that are empty then.
///
/// # Errors
///
/// Fails, with as much done as could be, if the table of mounts can't be read or a file system is
/// neither unmounted nor parted from its folder.
pub(crate) fn unmount_below(folder: &Path) -> io::Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let name = folder.to_string_lossy();
    let itself = table.lines().filter_map(|line| line.split(' ').nth(4)).filter(|at| **at == *name);
    let mut outcome = Ok(());
    for target in itself.chain(mounted_below(&table, &name)).collect::<Vec<_>>().into_iter().rev() {
        let mut unmounted = unmount(target, UnmountFlags::NOFOLLOW);
        if unmounted == Err(Errno::BUSY) {
            log::warn!("{target} is in use: it goes when it is not any more");
            unmounted = unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
        }
        outcome = outcome.and(unmounted.map_err(io::Error::from));
    }
    remove_empty(folder);
    outcome
}

/// Removes folders from the bottom up, and nothing that has something in it.
fn remove_empty(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_empty(&entry.path());
        }
    }
    if let Err(error) = fs::remove_dir(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{} stays: {error}", folder.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_below_the_folder_are_found() {
        let table = "1 0 0:1 / / rw - tmpfs t rw\n2 1 0:2 / /run/nacre/a rw - tmpfs t rw\n\
                     3 1 0:3 / /run/nacrex rw - tmpfs t rw\n4 2 0:4 / /run/nacre/a/b rw - x x rw\n";
        let found: Vec<_> = mounted_below(table, "/run/nacre").collect();
        assert_eq!(found, ["/run/nacre/a", "/run/nacre/a/b"]);
    }

    #[test]
    fn only_empty_folders_are_removed() {
        let top = tempfile::tempdir().unwrap();
        let file = top.path().join("a/b/file");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::create_dir_all(top.path().join("a/c/d")).unwrap();
        fs::write(&file, "").unwrap();
        remove_empty(&top.path().join("a"));
        assert!(file.exists() && !top.path().join("a/c").exists());
    }
}
