//! What the jail of a network device lets through, and what the device says of itself.
//!
//! The tap is open before the jail closes; afterwards a worker only moves frames and tells the
//! tap what the guest's driver can take.

use backend_daemon::process::Policy;

/// The policy of `nacre-net`.
pub const POLICY: Policy = Policy {
    worker_syscalls: &[
        // Frames.
        libc::SYS_readv,
        libc::SYS_writev,
        // The eventfd between workers.
        libc::SYS_read,
        libc::SYS_write,
    ],
    // What the guest's driver can take, which queues are in use, and whether the tap is there.
    worker_ioctls: &[
        libc::TUNSETOFFLOAD,
        libc::TUNSETVNETHDRSZ,
        libc::TUNSETQUEUE,
        libc::TUNGETIFF,
    ],
    ..Policy::of("net")
};
