//! Runs of segments: cutting them, and vectored system calls on them.

use std::io;
use std::os::fd::BorrowedFd;

use crate::sys::{self, Segment};

/// The segments without their first `offset` bytes.
pub fn skip(segments: &[Segment], offset: u64) -> impl Iterator<Item = Segment> + '_ {
    let mut left = offset;
    segments.iter().filter_map(move |segment| {
        let cut = left.min(segment.len() as u64);
        left -= cut;
        segment.tail(usize::try_from(cut).ok()?)
    })
}

/// The segments' first `bytes` bytes.
pub fn take(segments: impl Iterator<Item = Segment>, bytes: u64) -> impl Iterator<Item = Segment> {
    let mut left = bytes;
    segments.map_while(move |segment| {
        let part = segment.head(usize::try_from(left).unwrap_or(usize::MAX));
        left -= part.len() as u64;
        (!part.is_empty()).then_some(part)
    })
}

/// The segments' total length, in bytes.
#[must_use]
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.len() as u64).sum()
}

/// `writev(2)` of guest memory, without copying it first.
///
/// # Errors
///
/// What the system call gives.
pub fn writev(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    sys::writev(fd, segments)
}

/// `readv(2)` into guest memory, without copying it first.
///
/// # Errors
///
/// What the system call gives.
pub fn readv(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    sys::readv(fd, segments)
}
