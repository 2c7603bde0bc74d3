//! The sandbox: after it, the share is the root directory and all that the process can open.
//!
//! It is entered by the process itself, without a fork: who watches the process watches the one
//! that serves. In `namespace` mode:
//!
//! ```text
//!   own mount namespace, its mounts slaves of the host's   (nothing of ours leaves; what the host
//!     |                                                     mounts below the share still arrives)
//!   a clone of /proc/self/fd, mounted nowhere              (virtiofsd reopens files through it)
//!     |
//!   a clone of the share: no devices, no set-uid, no programs, read-only if asked
//!     |
//!   pivot_root into it, the old root unmounted             (from an initramfs: moved over the root)
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use rustix::fs::{CWD, Mode, OFlags, fstat, open};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{chdir, chroot, fchdir, geteuid, pivot_root};
use rustix::thread::set_thread_groups;

use crate::sys;

/// How the process is kept inside the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxMode {
    /// A mount namespace in which there is nothing else; needs CAP_SYS_ADMIN
    Namespace,
    /// The share as root directory; needs CAP_SYS_CHROOT
    Chroot,
    /// Not at all: a hostile guest can name files outside; for callers that confine the process
    None,
}

/// Why the sandbox can't be entered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The process lacks the right to it.
    #[error(
        "no right to {what}: run as root (CAP_SYS_ADMIN, for --sandbox chroot CAP_SYS_CHROOT), or \
         choose --sandbox none"
    )]
    Privilege {
        /// What was attempted.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refuses something else.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The folder to share, open: it can't be exchanged any more.
#[derive(Debug)]
pub struct SharedDir {
    path: PathBuf,
    fd: OwnedFd,
}

/// What the file server needs to know of the place it is in.
#[derive(Debug)]
pub struct Place {
    /// The share's path as the process sees it now.
    pub root_dir: PathBuf,
    /// The process's own `/proc/self/fd`, to reopen files by.
    pub proc_self_fd: File,
}

impl SharedDir {
    /// Opens the folder.
    ///
    /// # Errors
    ///
    /// Fails if it is missing, or no folder.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let fd = open_folder(&path)?;
        Ok(Self { path, fd })
    }

    /// Enters the sandbox. To be called once, before the process has a second thread.
    ///
    /// # Errors
    ///
    /// Fails if the process lacks the right, or the kernel refuses something else; the process is
    /// then somewhere between inside and outside, and has to end.
    pub fn enter(self, mode: SandboxMode, read_only: bool) -> Result<Place, SandboxError> {
        drop_groups()?;
        match mode {
            SandboxMode::Namespace => self.enter_namespace(read_only),
            SandboxMode::Chroot => self.enter_chroot(),
            SandboxMode::None => {
                Ok(Place { proc_self_fd: open_proc_self_fd()?, root_dir: self.path })
            }
        }
    }

    fn enter_namespace(self, read_only: bool) -> Result<Place, SandboxError> {
        sys::own_mount_namespace().map_err(failed("make a mount namespace"))?;
        let slaves = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", slaves).map_err(errno("cut off the host's mounts"))?;
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let proc_self_fd = open_tree(CWD, "/proc/self/fd", clone)
            .map_err(errno("clone the mount of /proc/self/fd"))?;
        let here = self.found_again()?;
        let whole = clone | OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::AT_RECURSIVE;
        let share = open_tree(&here, "", whole).map_err(errno("clone the mount of the share"))?;
        sys::add_mount_attributes(share.as_fd(), attributes(read_only))
            .map_err(failed("restrict the mount of the share"))?;
        let empty =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&share, "", &here, "", empty).map_err(errno("mount the share"))?;
        switch_root(&share)?;
        Ok(Place { root_dir: PathBuf::from("/"), proc_self_fd: File::from(proc_self_fd) })
    }

    /// The same folder in the new mount namespace: a descriptor stays in the one it came from.
    fn found_again(&self) -> Result<OwnedFd, SandboxError> {
        let again = open_folder(&self.path).map_err(errno("open the shared folder again"))?;
        let identity = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
        let unchanged = identity(&again).and_then(|found| Ok(found == identity(&self.fd)?));
        if unchanged.map_err(errno("look at the shared folder"))? {
            Ok(again)
        } else {
            let source = io::Error::from(io::ErrorKind::StaleNetworkFileHandle);
            Err(SandboxError::Host { what: "find the shared folder again", source })
        }
    }

    fn enter_chroot(self) -> Result<Place, SandboxError> {
        let proc_self_fd = open_proc_self_fd()?;
        fchdir(&self.fd).map_err(errno("enter the share"))?;
        chroot(".").map_err(errno("make the share the root directory"))?;
        chdir("/").map_err(errno("enter the share"))?;
        Ok(Place { root_dir: PathBuf::from("/"), proc_self_fd })
    }
}

/// Makes the mount `share` the root directory and leaves the old root behind.
fn switch_root(share: &OwnedFd) -> Result<(), SandboxError> {
    let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old_root = open("/", folder, Mode::empty()).map_err(errno("open the old root"))?;
    fchdir(share).map_err(errno("enter the share"))?;
    match pivot_root(".", ".") {
        Ok(()) => {
            fchdir(&old_root).map_err(errno("go back to the old root"))?;
            // Unmounting must not reach the host.
            let slaves = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
            mount_change(".", slaves).map_err(errno("cut off the old root"))?;
            unmount(".", UnmountFlags::DETACH).map_err(errno("unmount the old root"))?;
            fchdir(share).map_err(errno("enter the share"))
        }
        // The kernel's first root, an initramfs for example, can't be exchanged: cover it.
        Err(rustix::io::Errno::INVAL) => {
            let from = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(share, "", CWD, "/", from).map_err(errno("move the share over the root"))?;
            fchdir(share).map_err(errno("enter the share"))?;
            chroot(".").map_err(errno("make the share the root directory"))?;
            chdir("/").map_err(errno("enter the share"))
        }
        Err(error) => Err(errno("make the share the root directory")(error)),
    }
}

/// A guest must find nothing in the share that the host's kernel would act on.
fn attributes(read_only: bool) -> u64 {
    let always = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    always | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 }
}

fn open_proc_self_fd() -> Result<File, SandboxError> {
    let opened = open_folder(Path::new("/proc/self/fd"));
    opened.map(File::from).map_err(errno("open /proc/self/fd"))
}

fn open_folder(path: &Path) -> rustix::io::Result<OwnedFd> {
    open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A request runs with the guest's user and group; root's other groups must not help it.
fn drop_groups() -> Result<(), SandboxError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    match set_thread_groups(&[]) {
        // In a user namespace that denies setgroups there is no way to change groups at all.
        Ok(()) | Err(rustix::io::Errno::PERM) => Ok(()),
        Err(error) => Err(errno("give up supplementary groups")(error)),
    }
}

fn errno(what: &'static str) -> impl Fn(rustix::io::Errno) -> SandboxError {
    move |error| failed(what)(error.into())
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> SandboxError {
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => SandboxError::Privilege { what, source },
        _ => SandboxError::Host { what, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_never_has_devices_set_uid_files_or_programs() {
        let hard = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        assert_eq!(attributes(false), hard);
        assert_eq!(attributes(true), hard | libc::MOUNT_ATTR_RDONLY);
    }

    #[test]
    fn a_missing_right_is_told_from_other_failures() {
        let error = errno("do it")(rustix::io::Errno::PERM);
        assert!(matches!(error, SandboxError::Privilege { what: "do it", .. }));
        assert!(error.to_string().contains("--sandbox none"));
        assert!(matches!(errno("do it")(rustix::io::Errno::BUSY), SandboxError::Host { .. }));
    }

    #[test]
    fn only_a_folder_can_be_shared() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(SharedDir::open(file.path()).is_err());
        assert!(SharedDir::open(Path::new("/nowhere/at/all")).is_err());
        assert!(SharedDir::open(Path::new("/tmp")).is_ok());
    }
}
