//! What `nacre-blk` says of itself, and may do once it is jailed.
//!
//! The ring of io_uring is restricted by itself (see `sys`): the list of system calls can't see
//! what is submitted to it.

use backend_daemon::process::Policy;

/// The block device's policy: it only reads, writes, frees and flushes its one open file.
pub const POLICY: Policy = Policy {
    features: &["read-only", "blk-file"],
    worker_syscalls: &[
        libc::SYS_io_uring_enter,
        libc::SYS_preadv,
        libc::SYS_pwritev2,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
    ],
    // An image may grow under its guest.
    refreshes: true,
    ..Policy::of("block")
};
