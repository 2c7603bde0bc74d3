#![expect(unsafe_code, reason = "raw pointers into guest memory and vectored system calls on them")]
//! The daemon's system calls on guest memory: one a function, owned safe types out.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use vm_memory::volatile_memory::VolatileSlice;

/// A piece of guest memory, checked to be mapped. It never becomes a Rust reference: the guest
/// may write there at any time.
///
/// Invariant: `address..address + len` stays mapped as long as the [`crate::ring::Chain`] that
/// the segment came from exists, for the chain holds the memory's guard.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    address: *mut u8,
    len: usize,
}

// SAFETY: a segment is an address and a length; the mapping that it points into belongs to the
// process and not to a thread, and all access goes through raw copies or system calls.
unsafe impl Send for Segment {}

impl Segment {
    pub(crate) fn new(slice: &VolatileSlice<'_>) -> Self {
        Self { address: slice.ptr_guard_mut().as_ptr(), len: slice.len() }
    }

    /// Its length, in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address in this process, for a system call.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.address
    }

    /// The segment without its first `bytes` bytes, or nothing if none are left.
    #[must_use]
    pub fn tail(&self, bytes: usize) -> Option<Self> {
        let len = self.len.checked_sub(bytes).filter(|len| *len > 0)?;
        Some(Self { address: self.address.wrapping_add(bytes), len })
    }

    /// The segment's first `bytes` bytes, or all of it.
    #[must_use]
    pub fn head(&self, bytes: usize) -> Self {
        Self { address: self.address, len: self.len.min(bytes) }
    }

    /// For a vectored system call.
    #[must_use]
    pub fn as_iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.address.cast(), iov_len: self.len }
    }

    pub(crate) fn copy_to(self, bytes: &mut [u8]) -> usize {
        let len = self.len.min(bytes.len());
        // SAFETY: the source is mapped for `self.len >= len` bytes (the type's invariant), the
        // target is an exclusive slice of at least `len` bytes, and a Rust allocation never
        // overlaps guest memory.
        unsafe { self.address.copy_to_nonoverlapping(bytes.as_mut_ptr(), len) };
        len
    }

    pub(crate) fn copy_from(self, bytes: &[u8]) -> usize {
        let len = self.len.min(bytes.len());
        // SAFETY: as in `copy_to`, in the other direction; guest memory is mapped writable.
        unsafe { self.address.copy_from_nonoverlapping(bytes.as_ptr(), len) };
        len
    }
}

/// The kernel's limit on vectors in one call.
const IOV_MAX: usize = 1024;

fn iovecs(segments: &[Segment]) -> Vec<libc::iovec> {
    segments.iter().take(IOV_MAX).map(Segment::as_iovec).collect()
}

pub(crate) fn writev(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let vectors = iovecs(segments);
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `vectors` holds `count` vectors of mapped memory (the type's invariant); the kernel
    // copes with memory that changes while it reads.
    let written = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(written).map_err(|_error| io::Error::last_os_error())
}

pub(crate) fn readv(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let vectors = iovecs(segments);
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: as in `writev`; guest memory is mapped writable and no Rust reference points there.
    let read = unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(read).map_err(|_error| io::Error::last_os_error())
}

/// Takes ownership of an inherited descriptor and sets it close-on-exec.
pub(crate) fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: `fcntl` with these commands takes no pointer; a bad number gives an error.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and by the contract of the command line it was passed to
    // this process for it to own: nothing else in the process knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A new epoll instance, close-on-exec.
pub(crate) fn epoll() -> io::Result<OwnedFd> {
    let number = epoll::create(true)?;
    // SAFETY: the call above made the descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Blocks `signals` on the calling thread, and makes a descriptor that they come to
/// and that never blocks.
pub(crate) fn signals(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the pointer is to a whole set, which the call initialises.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the call above.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the set is initialised; a signal that does not exist gives an error.
        if unsafe { libc::sigaddset(&raw mut set, *signal) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the set is initialised, and the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: the set is initialised; -1 asks for a new descriptor.
    let number = unsafe { libc::signalfd(-1, &raw const set, flags) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made the descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Has all threads allocate from one heap. When a thread's own shrinks, the GNU allocator opens
/// `/proc/sys/vm/overcommit_memory`, which no jailed thread may.
pub(crate) fn one_arena() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the call takes no pointers and only sets a limit of the allocator.
        let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        debug_assert_eq!(set, 1, "the allocator knows its own option");
    }
}
