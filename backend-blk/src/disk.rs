//! The open file behind the device: what it is, how long, what it can do, and that it is ours.

use std::fs::{self, File};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, FallocateFlags, OFlags, StatxFlags, fallocate, fcntl_getfl, fcntl_setfl,
    ioctl_blksszget, statx,
};

use crate::request::{Limits, SECTOR_BYTES};
use crate::sys;

/// Why a file can't be the disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The path can't be opened.
    #[error("cannot open the disk {name}")]
    Open {
        /// The disk's name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// There is no such descriptor.
    #[error("cannot take the disk from descriptor {number}")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// Why.
        source: io::Error,
    },
    /// The kernel doesn't say what the file is.
    #[error("cannot examine the disk {name}")]
    Examine {
        /// The disk's name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A folder, a pipe, a terminal.
    #[error("the disk {name} is neither a file nor a block device")]
    Kind {
        /// The disk's name.
        name: String,
    },
    /// The file can't be a disk of whole blocks.
    #[error("the disk {name} has {size_bytes} bytes, no positive multiple of {block_bytes}")]
    Size {
        /// The disk's name.
        name: String,
        /// Its size.
        size_bytes: u64,
        /// What it should be a multiple of.
        block_bytes: u64,
    },
    /// The descriptor does not allow what is asked.
    #[error("the disk {name} is open for reading only, and `--read-only` was not given")]
    Access {
        /// The disk's name.
        name: String,
    },
    /// The file system knows no direct I/O.
    #[error("the disk {name} can't bypass the page cache")]
    Direct {
        /// The disk's name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Somebody else uses it.
    #[error("the disk {name} is in use by {holder}")]
    InUse {
        /// The disk's name.
        name: String,
        /// Who, as far as it can be told.
        holder: String,
    },
    /// Locking failed for another reason.
    #[error("cannot lock the disk {name}")]
    Lock {
        /// The disk's name.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// How the disk is used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) read_only: bool,
    /// Bypass the page cache.
    pub(crate) direct: bool,
    /// How long to wait for the lock.
    pub(crate) lock_wait: Duration,
}

/// How direct I/O has to be aligned, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    pub(crate) memory: usize,
    pub(crate) offset: u64,
}

/// What direct I/O may need where the kernel does not say (before Linux 6.1).
const CAUTIOUS: Alignment = Alignment { memory: 4096, offset: 4096 };

/// What the guest was told of a disk, which may grow under it.
#[derive(Debug)]
pub(crate) struct Shown {
    first: Limits,
    size_bytes: AtomicU64,
}

impl Shown {
    pub(crate) fn new(first: Limits) -> Self {
        Self { first, size_bytes: AtomicU64::new(first.size_bytes) }
    }

    /// As it is now.
    pub(crate) fn limits(&self) -> Limits {
        Limits { size_bytes: self.size_bytes.load(Ordering::Acquire), ..self.first }
    }

    /// The disk has so many bytes now; tells whether these are more whole blocks than before. One
    /// that has shrunk keeps its size in the guest's eyes, and requests behind the end fail.
    pub(crate) fn grow_to(&self, size_bytes: u64) -> bool {
        let size_bytes = size_bytes - size_bytes % self.first.block_bytes;
        self.size_bytes.fetch_max(size_bytes, Ordering::AcqRel) < size_bytes
    }
}

/// How soon to try again for the lock: a guest waits meanwhile.
const LOCK_PAUSE: Duration = Duration::from_millis(1);

/// A disk, locked.
#[derive(Debug)]
pub(crate) struct Disk {
    file: File,
    /// As they were when it was opened.
    pub(crate) limits: Limits,
    /// Set if I/O is direct.
    pub(crate) alignment: Option<Alignment>,
}

impl Disk {
    /// Opens and locks the disk at `path`.
    pub(crate) fn open(path: &Path, mode: Mode) -> Result<Self, DiskError> {
        let name = path.display().to_string();
        let flags = if mode.direct { OFlags::DIRECT } else { OFlags::empty() };
        let flags = i32::try_from(flags.bits()).unwrap_or_default();
        let file = File::options()
            .read(true)
            .write(!mode.read_only)
            .custom_flags(flags)
            .open(path)
            .map_err(|source| DiskError::Open { name: name.clone(), source })?;
        Self::adopt(file, &name, mode)
    }

    /// Takes a disk that was opened by somebody else.
    ///
    /// It is opened once more: a lock belongs to an open file, and the one that was handed in may
    /// be a predecessor's too. The lock would then not show that the predecessor's I/O has ended.
    pub(crate) fn reopen(fd: OwnedFd, name: &str, mode: Mode) -> Result<Self, DiskError> {
        let given = File::from(fd);
        // No more rights than were handed in.
        check_access(&given, name, mode)?;
        let path = format!("/proc/self/fd/{}", given.as_raw_fd());
        let anew = File::options().read(true).write(!mode.read_only).open(path);
        let file = anew.unwrap_or_else(|error| {
            log::warn!("{name} is not opened anew: a predecessor's I/O may still come: {error}");
            given
        });
        Self::adopt(file, name, mode)
    }

    /// Locks and examines an open disk. `name` is for messages.
    pub(crate) fn adopt(mut file: File, name: &str, mode: Mode) -> Result<Self, DiskError> {
        let name = name.to_owned();
        let examine = |source| DiskError::Examine { name: name.clone(), source };
        let metadata = file.metadata().map_err(examine)?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(DiskError::Kind { name });
        }
        check_access(&file, &name, mode)?;
        lock(&file, &name, mode, &metadata)?;
        let alignment = if mode.direct { Some(make_direct(&file, &name)?) } else { None };
        // The end of a block device is its size, though its metadata says 0.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(examine)?;
        let block_bytes = alignment.map_or(SECTOR_BYTES, |it| it.offset.max(SECTOR_BYTES));
        if size_bytes == 0 || !size_bytes.is_multiple_of(block_bytes) {
            return Err(DiskError::Size { name, size_bytes, block_bytes });
        }
        let can = |how| !mode.read_only && (is_device || can_allocate(&file, how, size_bytes));
        let limits = Limits {
            size_bytes,
            block_bytes,
            read_only: mode.read_only,
            can_discard: can(FallocateFlags::PUNCH_HOLE),
            can_zero: can(FallocateFlags::ZERO_RANGE),
        };
        Ok(Self { file, limits, alignment })
    }

    /// How many bytes it has now.
    pub(crate) fn size_bytes(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check_access(file: &File, name: &str, mode: Mode) -> Result<(), DiskError> {
    let flags = fcntl_getfl(file)
        .map_err(|error| DiskError::Examine { name: name.to_owned(), source: error.into() })?;
    let write_only = flags & OFlags::RWMODE == OFlags::WRONLY;
    let read_only = flags & OFlags::RWMODE == OFlags::RDONLY;
    if write_only {
        let source = io::Error::from(io::ErrorKind::PermissionDenied);
        return Err(DiskError::Examine { name: name.to_owned(), source });
    }
    if read_only && !mode.read_only {
        return Err(DiskError::Access { name: name.to_owned() });
    }
    Ok(())
}

/// Turns the page cache off, and finds out what that takes.
fn make_direct(file: &File, name: &str) -> Result<Alignment, DiskError> {
    let direct = |error: rustix::io::Errno| DiskError::Direct {
        name: name.to_owned(),
        source: error.into(),
    };
    let flags = fcntl_getfl(file).map_err(direct)?;
    fcntl_setfl(file, flags | OFlags::DIRECT).map_err(direct)?;
    if let Ok(stat) = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && stat.stx_dio_offset_align.is_power_of_two()
        && stat.stx_dio_mem_align.is_power_of_two()
    {
        return Ok(Alignment {
            memory: stat.stx_dio_mem_align as usize,
            offset: stat.stx_dio_offset_align.into(),
        });
    }
    let offset = ioctl_blksszget(file).map_or(CAUTIOUS.offset, u64::from);
    Ok(Alignment { offset, ..CAUTIOUS })
}

/// Whether the file system can do this kind of `fallocate`. It is tried behind the end of the
/// file, where there is nothing to lose, and undone.
fn can_allocate(file: &File, how: FallocateFlags, size_bytes: u64) -> bool {
    const TRIAL_BYTES: u64 = 4096;
    let trial = fallocate(file, how | FallocateFlags::KEEP_SIZE, size_bytes, TRIAL_BYTES);
    if how == FallocateFlags::ZERO_RANGE && trial.is_ok() {
        let undo = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = fallocate(file, undo, size_bytes, TRIAL_BYTES) {
            log::debug!("a trial allocation stays behind the disk's end: {error}");
        }
    }
    trial.is_ok()
}

/// Locks the whole file by its open file description: exclusively to write, shared to read. The
/// lock goes with the last reference to it, and each request that a killed process had handed to
/// the kernel is one: who gets the lock knows that nothing of a predecessor reaches the disk any
/// more.
fn lock(file: &File, name: &str, mode: Mode, metadata: &fs::Metadata) -> Result<(), DiskError> {
    let name = name.to_owned();
    let start = Instant::now();
    let mut is_said = false;
    loop {
        match sys::lock(file.as_fd(), !mode.read_only) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(source) => return Err(DiskError::Lock { name, source }),
        }
        if start.elapsed() >= mode.lock_wait {
            let holder = holder(metadata);
            let holder = holder.unwrap_or_else(|| "another process".to_owned());
            return Err(DiskError::InUse { name, holder });
        }
        if !is_said {
            log::info!("waiting for the lock of the disk {name}");
            is_said = true;
        }
        thread::sleep(LOCK_PAUSE);
    }
}

/// Another process that has the file open, as far as `/proc` tells us: an open file
/// description's lock does not say whose it is.
fn holder(disk: &fs::Metadata) -> Option<String> {
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name().to_str().unwrap_or_default().to_owned();
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let has_it = descriptors.flatten().any(|descriptor| {
            fs::metadata(descriptor.path())
                .is_ok_and(|found| (found.dev(), found.ino()) == (disk.dev(), disk.ino()))
        });
        if has_it {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", command.trim_end()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: Mode = Mode { read_only: false, direct: false, lock_wait: Duration::ZERO };

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn a_file_of_whole_sectors_is_a_disk_and_keeps_its_length() {
        let image = image(1 << 20);
        let disk = Disk::open(image.path(), MODE).unwrap();
        assert_eq!(disk.limits.size_bytes, 1 << 20);
        assert_eq!(image.as_file().metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn an_empty_file_and_one_of_half_a_sector_are_no_disks() {
        for bytes in [0, 100, 513] {
            let result = Disk::open(image(bytes).path(), MODE);
            assert!(matches!(result, Err(DiskError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn a_folder_is_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let mode = Mode { read_only: true, ..MODE };
        assert!(matches!(Disk::open(folder.path(), mode), Err(DiskError::Kind { .. })));
    }

    #[test]
    fn a_disk_has_one_writer_or_many_readers() {
        let image = image(4096);
        let read_only = Mode { read_only: true, ..MODE };
        let writer = Disk::open(image.path(), MODE).unwrap();
        assert!(matches!(Disk::open(image.path(), MODE), Err(DiskError::InUse { .. })));
        assert!(matches!(Disk::open(image.path(), read_only), Err(DiskError::InUse { .. })));
        drop(writer);
        let _reader = Disk::open(image.path(), read_only).unwrap();
        let _second = Disk::open(image.path(), read_only).unwrap();
        assert!(matches!(Disk::open(image.path(), MODE), Err(DiskError::InUse { .. })));
    }

    #[test]
    fn a_disk_that_was_handed_in_has_a_lock_of_its_own() {
        let image = image(4096);
        let handed_in = || OwnedFd::from(image.as_file().try_clone().unwrap());
        let first = Disk::reopen(handed_in(), "it", MODE).unwrap();
        assert!(matches!(Disk::reopen(handed_in(), "it", MODE), Err(DiskError::InUse { .. })));
        let waiting = thread::scope(|scope| {
            let mode = Mode { lock_wait: Duration::from_secs(20), ..MODE };
            let waiting = scope.spawn(move || Disk::reopen(handed_in(), "it", mode));
            drop(first);
            waiting.join().unwrap()
        });
        assert!(waiting.is_ok());
        let read_only = OwnedFd::from(File::open(image.path()).unwrap());
        assert!(matches!(Disk::reopen(read_only, "it", MODE), Err(DiskError::Access { .. })));
    }

    #[test]
    fn a_read_only_descriptor_is_no_writable_disk() {
        let image = image(4096);
        let file = File::open(image.path()).unwrap();
        assert!(matches!(Disk::adopt(file, "it", MODE), Err(DiskError::Access { .. })));
    }
}
