//! The system calls that this device's worker needs besides the daemon's own.

/// Where they lead is bounded by the process's root directory and network namespace: see
/// `host.rs`. Reading, writing and polling are in the daemon's own list.
pub const WORKER: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_recvfrom,
    // Looking at a host program's bytes, and how far that went.
    libc::SYS_recvmsg,
    libc::SYS_setsockopt,
    // What the supervisor keeps for a successor.
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    // From the pipe to host programs.
    libc::SYS_splice,
];
