#![expect(
    unsafe_code,
    reason = "unshare(2) is unsafe for what it may do to a process with threads"
)]
//! The one system call that has no safe binding.

use std::io;

use rustix::thread::{UnshareFlags, unshare_unsafe};

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
