//! The system calls that each kind of thread may make once the jail is closed.
//!
//! None of the lists has a way to open a file, make or connect a socket, start a program or a
//! thread. Everything else that a thread tries ends the process.

use std::collections::BTreeMap;
use std::env;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What every thread needs: memory, locks, logging, time, and to end.
const EVERYWHERE: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    libc::SYS_sched_yield,
    // The allocator counts processors when it makes an arena for a thread.
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    // A thread's or the process's end, an abort's included.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
];

/// The main thread waits, and at the end removes the socket's path if it is still its own.
const MAIN: &[c_long] = &[
    libc::SYS_statx,
    libc::SYS_newfstatat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// The protocol thread takes frontends, their messages and their memory.
const PROTOCOL: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_fstat,
    // `File::metadata` of a descriptor: no path is followed with an empty one.
    libc::SYS_statx,
    libc::SYS_shutdown,
    // It makes the region in which requests in flight are marked.
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
];

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind<'a> {
    /// Waits for signals and for the other threads' ends.
    Main,
    /// Talks to frontends.
    Protocol,
    /// Serves queues; with the device's own system calls.
    Worker(&'a [i64]),
}

/// The filter of one kind of thread.
pub(super) fn filter(kind: Kind<'_>) -> Result<BpfProgram, BackendError> {
    let own: &[i64] = match kind {
        Kind::Main => MAIN,
        Kind::Protocol => PROTOCOL,
        Kind::Worker(own) => own,
    };
    let mut rules = constrained()?;
    for number in EVERYWHERE.iter().chain(own) {
        // No rules means: whatever the arguments.
        let own_rules = if *number == libc::SYS_socket { unix_only()? } else { Vec::new() };
        rules.insert(*number, own_rules);
    }
    let arch = TargetArch::try_from(env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise(), SeccompAction::Allow, arch)?.try_into()
}

/// Calls that are harmless with some arguments only.
fn constrained() -> Result<Rules, BackendError> {
    let no_exec = || condition(2, SeccompCmpOp::MaskedEq(exec()), 0);
    let exactly = |value| condition(1, SeccompCmpOp::Eq, value);
    let fcntl = [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD, libc::F_DUPFD_CLOEXEC];
    let fcntl = fcntl.into_iter().map(|command| exactly(u64::from(command.unsigned_abs())));
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    let equal = |argument, value: i32| {
        let value = u64::from(value.unsigned_abs());
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let seal = SeccompRule::new(vec![equal(1, libc::F_ADD_SEALS)?, equal(2, seals)?]);
    let fcntl = fcntl.chain([seal]);
    Ok(Rules::from([
        (libc::SYS_mmap, vec![no_exec()?]),
        (libc::SYS_mprotect, vec![no_exec()?]),
        (libc::SYS_fcntl, fcntl.collect::<Result<_, _>>()?),
        // How the standard library makes a socket non-blocking.
        (libc::SYS_ioctl, vec![exactly(libc::FIONBIO)?]),
    ]))
}

/// A device that makes sockets makes Unix sockets: others (vsock, crypto, netlink) reach what no
/// root directory and no network namespace bounds.
fn unix_only() -> Result<Vec<SeccompRule>, BackendError> {
    Ok(vec![condition(0, SeccompCmpOp::Eq, u64::from(libc::AF_UNIX.unsigned_abs()))?])
}

fn condition(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)?;
    SeccompRule::new(vec![condition])
}

fn exec() -> u64 {
    u64::from(libc::PROT_EXEC.unsigned_abs())
}

/// What happens to a call that is not listed. A debug build can be told to let it pass and have
/// the kernel log it, to find out what a list lacks.
fn otherwise() -> SeccompAction {
    if cfg!(debug_assertions) && env::var_os("NACRE_SECCOMP").is_some_and(|value| value == "log") {
        return SeccompAction::Log;
    }
    SeccompAction::KillProcess
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_list_can_open_connect_execute_or_fork() {
        let forbidden = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
        ];
        for list in [EVERYWHERE, MAIN, PROTOCOL] {
            assert!(list.iter().all(|number| !forbidden.contains(number)));
        }
    }

    #[test]
    fn every_kind_of_thread_has_a_filter() {
        for kind in [Kind::Main, Kind::Protocol, Kind::Worker(&[libc::SYS_io_uring_enter])] {
            assert!(!filter(kind).unwrap().is_empty(), "{kind:?}");
        }
    }
}
