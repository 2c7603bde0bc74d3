//! Files that have no name any more: copies of them live in the supervisor's store, so that a
//! successor still has them.
//!
//! A file that the guest still holds goes to the store before its name goes. A supervisor that
//! takes nothing in for too long costs the guest that file if this process dies, and nothing else.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backend_daemon::logging::Limit;
use backend_daemon::process::Store;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};

/// The most files that are kept at a time, and the most that are open of them: what they take of
/// the supervisor's descriptors and of this process's.
pub(crate) const MOST_KEPT: usize = 1024;
/// How long a request may wait for the supervisor.
const PATIENCE: Duration = Duration::from_millis(100);
/// A path that the kernel takes at once is shorter than 4096 bytes.
const PATH_BYTES: usize = 3500;

/// The store, and the way to the files.
pub(crate) struct Keep {
    /// The shared folder.
    root: OwnedFd,
    proc_self_fd: File,
    store: Option<Store>,
    /// How many files are in the store.
    kept: AtomicUsize,
    /// What should not be there any more, but the supervisor could not be told.
    late: Mutex<Late>,
}

/// Nodes, and how often what goes wrong with them is logged.
type Late = (Vec<u64>, Limit);

impl Keep {
    /// The share's folder is at `root_dir`.
    pub(crate) fn new(
        root_dir: &Path,
        proc_self_fd: File,
        store: Option<Store>,
    ) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, root_dir, flags, Mode::empty())?;
        let (kept, late) = (AtomicUsize::new(0), Mutex::default());
        Ok(Self { root, proc_self_fd, store, kept, late })
    }

    /// Finds a file by its names from the share's folder on; it can't be read by that.
    pub(crate) fn find(&self, names: &[CString]) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let mut at: Option<OwnedFd> = None;
        let mut names = names.iter().peekable();
        while names.peek().is_some() {
            let mut path = PathBuf::new();
            while let Some(name) = names.next_if(|_name| path.as_os_str().len() < PATH_BYTES) {
                path.push(Path::new(OsStr::from_bytes(name.to_bytes())));
            }
            let folder = at.as_ref().unwrap_or(&self.root);
            at = Some(openat2(folder, &path, flags, Mode::empty(), beneath)?);
        }
        at.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Whether both are the same file.
    pub(crate) fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
        let identity = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
        identity(one).is_some_and(|known| identity(other) == Some(known))
    }

    /// Opens a file for what `flags` say, whatever its name. To open anything but a regular file
    /// could do more than that.
    pub(crate) fn reopen(&self, file: &OwnedFd, flags: OFlags) -> io::Result<File> {
        if FileType::from_raw_mode(fstat(file)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        let number = file.as_raw_fd().to_string();
        // virtiofsd does not pass these on either.
        let ours = OFlags::NOFOLLOW | OFlags::DIRECT | OFlags::NOATIME | OFlags::APPEND;
        let flags = (flags | OFlags::CLOEXEC) - ours;
        Ok(openat(&self.proc_self_fd, number.as_str(), flags, Mode::empty())?.into())
    }

    /// The folder of this process's descriptors, in which a file has its number for a name.
    pub(crate) fn proc_self_fd(&self) -> &File {
        &self.proc_self_fd
    }

    /// Whether there is a store.
    pub(crate) fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// A predecessor left so many files.
    pub(crate) fn take_over(&self, files: usize) {
        self.kept.fetch_add(files, Ordering::Relaxed);
    }

    /// Leaves a copy of a file to the successor; gives whether it is there.
    pub(crate) fn put(&self, node: u64, file: &OwnedFd) -> bool {
        // What is to be removed may be an earlier copy of this very file.
        let is_on_time = self.catch_up(&mut self.late());
        if !is_on_time || self.kept.load(Ordering::Relaxed) >= MOST_KEPT {
            return false;
        }
        let put = |store: &Store| store.put(node, file.as_fd());
        let Some(outcome) = self.send(put) else { return false };
        if let Err(error) = &outcome
            && self.late().1.allows()
        {
            log::warn!("a removed file would not outlive this process: {error}");
        }
        self.kept.fetch_add(usize::from(outcome.is_ok()), Ordering::Relaxed);
        outcome.is_ok()
    }

    /// Has the supervisor close the copy.
    pub(crate) fn remove(&self, node: u64) {
        let mut late = self.late();
        late.0.push(node);
        self.catch_up(&mut late);
    }

    fn late(&self) -> MutexGuard<'_, Late> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the supervisor what should not be there any more; gives whether it knows all of it.
    fn catch_up(&self, late: &mut Late) -> bool {
        while let Some(node) = late.0.last().copied() {
            if let Some(Err(_not_now)) = self.send(|store| store.remove(node)) {
                return false;
            }
            late.0.pop();
            self.kept.fetch_sub(1, Ordering::Relaxed);
        }
        true
    }

    /// Nothing without a store.
    fn send(&self, act: impl Fn(&Store) -> io::Result<()>) -> Option<io::Result<()>> {
        let store = self.store.as_ref()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = match act(store) {
                Ok(()) => return Some(Ok(())),
                Err(error) => error,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if error.kind() != io::ErrorKind::WouldBlock || left.is_zero() {
                return Some(Err(error));
            }
            let timeout = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::new(store, PollFlags::OUT)];
            if let Err(error) = poll(&mut fds, Some(&timeout)) {
                return Some(Err(error.into()));
            }
        }
    }
}
