//! What the jail of a shared folder lets through, and what the device says of itself.
//!
//! Files are the device's work, so a worker may open and change them; the sandbox sees to it that
//! the share is all it can reach. It makes no sockets, starts no programs and no threads.

use backend_daemon::process::Policy;
use caps::Capability;

/// The policy of `nacre-fs`.
pub const POLICY: Policy = Policy {
    worker_syscalls: &[
        // Find and open.
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_readlinkat,
        libc::SYS_getdents64,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_fstatfs,
        libc::SYS_dup,
        // Read and write.
        libc::SYS_lseek,
        libc::SYS_pread64,
        libc::SYS_preadv,
        libc::SYS_preadv2,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_pwritev2,
        libc::SYS_copy_file_range,
        libc::SYS_fallocate,
        libc::SYS_ftruncate,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_syncfs,
        libc::SYS_flock,
        // Make, rename and remove.
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_linkat,
        libc::SYS_symlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_unlinkat,
        // Attributes; of special files by way of /proc/self/fd as the working directory.
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_utimensat,
        libc::SYS_umask,
        libc::SYS_fchdir,
        libc::SYS_fgetxattr,
        libc::SYS_fsetxattr,
        libc::SYS_flistxattr,
        libc::SYS_fremovexattr,
        libc::SYS_getxattr,
        libc::SYS_setxattr,
        libc::SYS_listxattr,
        libc::SYS_removexattr,
        // As the guest's user, for the length of one request.
        libc::SYS_geteuid,
        libc::SYS_getegid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setgroups,
        libc::SYS_capget,
        libc::SYS_capset,
        // libcap-ng asks PR_CAPBSET_READ for the highest capability.
        libc::SYS_prctl,
        // Files without a name go to the supervisor's store, over the one socket there is.
        libc::SYS_sendmsg,
        libc::SYS_sendto,
    ],
    keep_capabilities: &[
        Capability::CAP_CHOWN,
        Capability::CAP_DAC_OVERRIDE,
        Capability::CAP_FOWNER,
        Capability::CAP_FSETID,
        Capability::CAP_SETGID,
        Capability::CAP_SETUID,
        Capability::CAP_MKNOD,
        Capability::CAP_SETFCAP,
    ],
    leaves_root: true,
    ..Policy::of("fs")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_reaches_no_network_and_starts_nothing() {
        let forbidden = [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_chroot,
            libc::SYS_unshare,
            libc::SYS_setns,
            // The way out of a mount by a handle.
            libc::SYS_open_by_handle_at,
        ];
        assert!(POLICY.worker_syscalls.iter().all(|number| !forbidden.contains(number)));
    }
}
