//! Reaching into a running container: nodes in its folders, mounts in its namespace.
//!
//! The container owns its root and may put a link anywhere in it. So every path is resolved by the
//! kernel as if the container's root were all there is, and through no link of /proc; what is made
//! or taken away is then named by the folder that was found, never by the path again.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, makedev, mkdirat, mknodat, open,
        openat, openat2, statat, unlinkat,
    },
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
    process::{fchdir, umask},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

use crate::{process::state::Live, sys};

const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// A running container, seen from the agent.
#[derive(Clone, Debug)]
pub(super) struct Inside {
    root: Arc<OwnedFd>,
    namespace: Arc<File>,
}

/// A folder of the container, and a name in it.
struct Entry {
    folder: OwnedFd,
    name: OsString,
}

impl Inside {
    /// The container of this init.
    ///
    /// # Errors
    ///
    /// Fails if it has ended.
    pub(super) fn of(init: &Live) -> io::Result<Self> {
        let process = PathBuf::from(format!("/proc/{}", init.pid.as_raw_nonzero()));
        let root = open(process.join("root"), FOLDER, Mode::empty())?;
        let namespace = File::open(process.join("ns/mnt"))?;
        // What was opened is the init's own if it still lives.
        sys::signal_pidfd(&init.pidfd, 0)?;
        Ok(Self { root: Arc::new(root), namespace: Arc::new(namespace) })
    }

    /// Makes a block device's node, in the place of one that is there.
    ///
    /// # Errors
    ///
    /// Fails as the kernel says, and if something else is there.
    pub(super) fn make_disk(
        &self,
        path: &Path,
        number: (u32, u32),
        read_only: bool,
    ) -> io::Result<()> {
        let Entry { folder, name } = self.entry(path)?;
        remove_node(&folder, &name)?;
        let mode = if read_only { Mode::from_raw_mode(0o440) } else { Mode::from_raw_mode(0o660) };
        self.within(move || {
            // The thread's own mask from now on: the mode is to be as it says.
            umask(Mode::empty());
            let number = makedev(number.0, number.1);
            Ok(mknodat(&folder, &name, FileType::BlockDevice, mode, number)?)
        })
    }

    /// Removes a block device's node, if it is there.
    ///
    /// # Errors
    ///
    /// Fails as the kernel says, and if something else is there.
    pub(super) fn remove_disk(&self, path: &Path) -> io::Result<()> {
        let Entry { folder, name } = self.entry(path)?;
        remove_node(&folder, &name)
    }

    /// Mounts what the guest has at `source` on a folder of the container, which is made if it is
    /// not there.
    ///
    /// # Errors
    ///
    /// Fails as the kernel says.
    pub(super) fn mount(&self, source: &Path, path: &Path) -> io::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, source, flags)?;
        let target = self.folder(path)?;
        self.within(move || {
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            Ok(move_mount(&tree, "", &target, "", flags)?)
        })
    }

    /// Unmounts what is mounted at `path`, if it is the same file system that the guest has at
    /// `source`.
    ///
    /// # Errors
    ///
    /// Fails if it is in use, and as the kernel says.
    pub(super) fn unmount(&self, source: &Path, path: &Path) -> io::Result<()> {
        let guests = rustix::fs::stat(source)?.st_dev;
        let Entry { folder, name } = self.entry(path)?;
        self.within(move || {
            match openat(&folder, &name, FOLDER | OFlags::NOFOLLOW, Mode::empty()) {
                Ok(there) if fstat(&there)?.st_dev == guests => {}
                // The container has something else there by now.
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            fchdir(&folder)?;
            Ok(unmount(&name, UnmountFlags::NOFOLLOW)?)
        })
    }

    /// A folder, made if need be with those above it.
    fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        let parts = path.strip_prefix("/").unwrap_or(path);
        let mut here = openat2(&self.root, ".", FOLDER, Mode::empty(), IN_ROOT)?;
        let mut prefix = PathBuf::new();
        for part in parts {
            prefix.push(part);
            // Always from the root: a link means what it means to the container.
            here = match openat2(&self.root, &prefix, FOLDER, Mode::empty(), IN_ROOT) {
                Ok(folder) => folder,
                Err(Errno::NOENT) => {
                    mkdirat(&here, part, Mode::from_raw_mode(0o755))?;
                    openat(&here, part, FOLDER | OFlags::NOFOLLOW, Mode::empty())?
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(here)
    }

    fn entry(&self, path: &Path) -> io::Result<Entry> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok(Entry { folder: self.folder(folder)?, name: name.to_os_string() })
    }

    /// Does `work` in the container's mount namespace, on a thread that ends with it.
    fn within<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let namespace = Arc::clone(&self.namespace);
        let entered = move || {
            // The kernel moves only a thread that shares its working folder with no other.
            sys::unshare(UnshareFlags::FS)?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
            work()
        };
        let thread = thread::Builder::new().name("container".to_owned()).spawn(entered)?;
        thread.join().map_err(|_panic| io::Error::other("the thread in the container broke off"))?
    }
}

fn remove_node(folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(there) if FileType::from_raw_mode(there.st_mode) == FileType::BlockDevice => {
            Ok(unlinkat(folder, name, AtFlags::empty())?)
        }
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn inside(root: &Path) -> Inside {
        let root = open(root, FOLDER, Mode::empty()).unwrap();
        let namespace = File::open("/proc/self/ns/mnt").unwrap();
        Inside { root: Arc::new(root), namespace: Arc::new(namespace) }
    }

    #[test]
    fn folders_are_made_below_the_root_whatever_links_say() {
        let top = tempfile::tempdir().unwrap();
        let (root, outside) = (top.path().join("root"), top.path().join("outside"));
        fs::create_dir_all(root.join("srv")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../outside", root.join("up")).unwrap();
        symlink("/srv", root.join("good")).unwrap();
        symlink("/proc/self/cwd", root.join("magic")).unwrap();
        let inside = inside(&root);
        inside.folder(Path::new("/good/a/b")).unwrap();
        assert!(root.join("srv/a/b").is_dir());
        for path in ["/absolute/a", "/up/a", "/magic/a"] {
            assert!(inside.folder(Path::new(path)).is_err(), "{path}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn only_a_disk_s_node_is_replaced_or_removed() {
        let top = tempfile::tempdir().unwrap();
        fs::write(top.path().join("file"), "kept").unwrap();
        let inside = inside(top.path());
        inside.remove_disk(Path::new("/none")).unwrap();
        assert!(inside.remove_disk(Path::new("/file")).is_err());
        assert!(inside.make_disk(Path::new("/file"), (7, 0), true).is_err());
        assert_eq!(fs::read_to_string(top.path().join("file")).unwrap(), "kept");
    }

    /// A process in a mount namespace of its own; killed when dropped.
    struct Cut(std::process::Child);

    impl Drop for Cut {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    impl Cut {
        fn start(command: &[&str]) -> Self {
            let mut unshare = std::process::Command::new("unshare");
            let process = Self(unshare.arg("--mount").args(command).spawn().unwrap());
            let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
            let pid = process.0.id().to_string();
            while namespace(&pid) == namespace("self") {
                thread::yield_now();
            }
            process
        }

        fn inside(&self) -> Inside {
            let pid = rustix::process::Pid::from_child(&self.0);
            let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
            Inside::of(&Live { pid, pidfd: Arc::new(pidfd.unwrap()) }).unwrap()
        }
    }

    #[test]
    fn mounts_and_nodes_come_to_a_namespace_that_is_in_use_and_go() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root makes mount namespaces");
            return;
        }
        let top = tempfile::tempdir().unwrap();
        let (source, place) = (top.path().join("source"), top.path().join("new/place"));
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "shared").unwrap();
        let container = Cut::start(&["sleep", "1000"]);
        let inside = container.inside();
        inside.mount(&source, &place).unwrap();
        let seen = PathBuf::from(format!("/proc/{}/root", container.0.id()));
        let there = seen.join(place.strip_prefix("/").unwrap());
        assert_eq!(fs::read_to_string(there.join("file")).unwrap(), "shared");
        assert!(!place.join("file").exists(), "mounted here, too");
        let held = File::open(&there).unwrap();
        let error = inside.unmount(&source, &place).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        drop(held);
        inside.unmount(&source, &place).unwrap();
        assert!(!there.join("file").exists());

        let node = top.path().join("disk");
        for (read_only, mode) in [(false, 0o660), (true, 0o440)] {
            inside.make_disk(&node, (7, 77), read_only).unwrap();
            let made = rustix::fs::lstat(&node).unwrap();
            assert_eq!((made.st_mode & 0o777, made.st_rdev), (mode, makedev(7, 77)));
        }
        inside.remove_disk(&node).unwrap();
        assert!(!node.exists());
    }
}
