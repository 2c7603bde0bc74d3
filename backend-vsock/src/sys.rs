#![expect(
    unsafe_code,
    reason = "namespaces, socket options, and system calls on memory that others write to"
)]
//! The system calls that have no safe binding: one a function, owned safe types out.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

use backend_daemon::ring::Segment;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use vm_memory::VolatileSlice;

/// Moves this process, which must have no other threads yet, into new namespaces.
pub(crate) fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    debug_assert!(
        (UnshareFlags::NEWNET | UnshareFlags::NEWUSER).contains(namespaces),
        "only namespaces may be unshared"
    );
    // SAFETY: the hazard of unshare is `FILES`, which takes descriptors away from other threads
    // that rely on them; callers pass namespaces alone.
    unsafe { unshare_unsafe(namespaces) }.map_err(io::Error::from)
}

/// Copies as much of the guest's memory as fits; gives how much that was, in bytes.
pub(crate) fn copy(from: Segment, to: &VolatileSlice<'_>) -> usize {
    let len = from.len().min(to.len());
    let target = to.ptr_guard_mut();
    // SAFETY: both pieces are mapped for at least `len` bytes, by the types' invariants; guest
    // memory and the ledger's are different mappings, so they don't overlap.
    unsafe { from.as_ptr().copy_to_nonoverlapping(target.as_ptr(), len) };
    len
}

/// `writev(2)` of memory that is shared.
pub(crate) fn writev(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let vectors: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        })
        .collect();
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `vectors` holds `count` vectors of memory that is mapped as long as `pieces` are
    // borrowed; the kernel copes with memory that changes while it reads.
    let written = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(written).map_err(|_error| io::Error::last_os_error())
}

/// Reads a socket's next bytes into guest memory without taking them; its peek offset moves on.
pub(crate) fn peek(socket: BorrowedFd<'_>, into: &[Segment]) -> io::Result<usize> {
    // The kernel's limit on vectors in one call.
    let mut vectors: Vec<libc::iovec> = into.iter().take(1024).map(Segment::as_iovec).collect();
    // SAFETY: all fields of the structure are integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the message names `vectors` alone, which are of guest memory that stays mapped as
    // long as the segments' chain exists; no Rust reference points there.
    let read = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    usize::try_from(read).map_err(|_error| io::Error::last_os_error())
}

/// The length of an integer option.
const OPTION_BYTES: libc::socklen_t = 4;

/// Where a socket's next peek starts, in bytes behind what was taken; negative if peeks don't move.
pub(crate) fn peek_offset(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let mut offset: libc::c_int = 0;
    let mut len_bytes = OPTION_BYTES;
    // SAFETY: the pointers are to a whole integer and to its length.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut offset).cast(),
            &raw mut len_bytes,
        )
    };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(offset) }
}

/// Has a socket's next peek start so many bytes behind what was taken, and move on from there.
pub(crate) fn set_peek_offset(socket: BorrowedFd<'_>, offset: i32) -> io::Result<()> {
    // SAFETY: the pointer is to a whole integer of this length.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            OPTION_BYTES,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends the process where it is, as a signal would that can't be caught.
#[cfg(all(not(test), debug_assertions))]
pub(crate) fn end(code: i32) -> ! {
    // SAFETY: the call does not return and runs nothing of this process.
    unsafe { libc::_exit(code) }
}

/// Gives whole pages of a shared mapping back to the host; they read as zero afterwards.
pub(crate) fn punch(pages: &VolatileSlice<'_>) -> io::Result<()> {
    let start = pages.ptr_guard_mut().as_ptr();
    // SAFETY: the pages are mapped; what is in them is lost, which is the caller's wish, and they
    // hold plain bytes that no Rust reference points to.
    let punched = unsafe { libc::madvise(start.cast(), pages.len(), libc::MADV_REMOVE) };
    if punched < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
