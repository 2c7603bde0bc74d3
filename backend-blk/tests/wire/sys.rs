#![expect(unsafe_code, reason = "a mount namespace of one thread")]
//! The tests' own system call.

use std::io;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A mount namespace of the calling thread's own, and of the programs it starts.
pub(crate) fn own_mounts() -> io::Result<()> {
    // SAFETY: no `FILES` among the flags, so all threads go on sharing their descriptors.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?)
}
