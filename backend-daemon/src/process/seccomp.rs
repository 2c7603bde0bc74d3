//! The system calls that each kind of thread may make once the jail is closed.
//!
//! None of the lists has a way to open a file, make or connect a socket, start a program or a
//! thread. Everything else that a thread tries ends the process.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::{env, process};

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::Policy;

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
    // How a device finds that its file has grown.
    libc::SYS_lseek,
    // It makes the region in which requests in flight are marked.
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
];

/// What the main thread may remove at the end, if anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    /// Nothing: it only waits.
    Nothing,
    /// A socket in the folder that is open under this number.
    InFolder(RawFd),
    /// What the program has made itself.
    Anything,
}

/// A kind of thread.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind<'a> {
    /// Waits for signals and for the other threads' ends.
    Main(Removal),
    /// Talks to frontends.
    Protocol,
    /// Serves queues; with what the device's policy adds.
    Worker(&'a Policy),
}

/// The filter of one kind of thread.
pub(super) fn filter(kind: Kind<'_>) -> Result<BpfProgram, BackendError> {
    let own: &[i64] = match kind {
        Kind::Main(_) => &[],
        Kind::Protocol => PROTOCOL,
        Kind::Worker(policy) => policy.worker_syscalls,
    };
    let mut rules = Rules::new();
    for number in EVERYWHERE.iter().chain(own) {
        rules.insert(*number, of_devices(*number)?);
    }
    rules.extend(constrained()?);
    match kind {
        Kind::Main(removal) => rules.extend(removing(removal)?),
        Kind::Protocol => {}
        Kind::Worker(policy) => {
            let ioctls = rules.entry(libc::SYS_ioctl).or_default();
            for request in policy.worker_ioctls {
                ioctls.push(condition(1, SeccompCmpOp::Eq, *request)?);
            }
        }
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
    let seal = SeccompRule::new(vec![equal(1, libc::F_ADD_SEALS)?, equal(2, seals)?]);
    let fcntl = fcntl.chain([seal]);
    // How the process aborts itself; no other process, and no other signal.
    let own = i32::try_from(process::id()).unwrap_or(i32::MAX);
    let abort = SeccompRule::new(vec![equal(0, own)?, equal(2, libc::SIGABRT)?])?;
    Ok(Rules::from([
        (libc::SYS_mmap, vec![no_exec()?]),
        (libc::SYS_mprotect, vec![no_exec()?]),
        (libc::SYS_fcntl, fcntl.collect::<Result<_, _>>()?),
        // How the standard library makes a socket non-blocking.
        (libc::SYS_ioctl, vec![exactly(libc::FIONBIO)?]),
        (libc::SYS_tgkill, vec![abort]),
    ]))
}

/// How the main thread finds that a socket's path is still its own, and removes it.
fn removing(removal: Removal) -> Result<Rules, BackendError> {
    Ok(match removal {
        Removal::Nothing => Rules::new(),
        Removal::InFolder(folder) => Rules::from([
            (libc::SYS_newfstatat, vec![SeccompRule::new(vec![equal(0, folder)?])?]),
            (libc::SYS_unlinkat, vec![SeccompRule::new(vec![equal(0, folder)?, equal(2, 0)?])?]),
        ]),
        Removal::Anything => {
            Rules::from([(libc::SYS_newfstatat, Vec::new()), (libc::SYS_unlinkat, Vec::new())])
        }
    })
}

/// What a device's own call may be given. No rules means: whatever the arguments.
fn of_devices(number: i64) -> Result<Vec<SeccompRule>, BackendError> {
    match number {
        libc::SYS_socket => unix_only(),
        // How far a socket's bytes were looked at, and no other option.
        libc::SYS_setsockopt => {
            let peek = vec![equal(1, libc::SOL_SOCKET)?, equal(2, libc::SO_PEEK_OFF)?];
            Ok(vec![SeccompRule::new(peek)?])
        }
        // Between a pipe and a socket, neither of which has offsets.
        libc::SYS_splice => {
            let null = |argument| {
                SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
            };
            Ok(vec![SeccompRule::new(vec![null(1)?, null(3)?])?])
        }
        _ => Ok(Vec::new()),
    }
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

/// That an argument of the type `int` is `value`.
fn equal(argument: u8, value: i32) -> Result<SeccompCondition, BackendError> {
    let value = u64::from(value.cast_unsigned());
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
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
    use libc::{BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_LD, BPF_RET};

    use super::*;

    const POLICY: Policy = Policy {
        worker_syscalls: &[libc::SYS_io_uring_enter],
        worker_ioctls: &[0x1234],
        ..Policy::of("test")
    };

    /// What the kernel makes of a system call with the first three arguments: the program is run
    /// on a `struct seccomp_data`.
    fn is_allowed(program: &BpfProgram, number: i64, arguments: [u64; 3]) -> bool {
        let arch = match env::consts::ARCH {
            "x86_64" => 0xc000_003e_u64,
            _ => 0xc000_00b7,
        };
        let mut data = [u64::try_from(number).unwrap() | arch << 32, 0, 0, 0, 0, 0, 0, 0];
        data[2..5].copy_from_slice(&arguments);
        let data: Vec<u8> = data.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (mut at, mut accumulator) = (0, 0_u32);
        loop {
            let step = &program[at];
            let (class, how) = (u32::from(step.code) & 0x07, u32::from(step.code) & 0xf0);
            at += 1;
            if class == BPF_RET {
                return step.k == libc::SECCOMP_RET_ALLOW;
            } else if class == BPF_LD {
                let word = data[step.k as usize..][..4].try_into().unwrap();
                accumulator = u32::from_le_bytes(word);
            } else if class == BPF_ALU && how == BPF_AND {
                accumulator &= step.k;
            } else if class == BPF_JMP && how == BPF_JA {
                at += step.k as usize;
            } else if class == BPF_JMP {
                let holds = match how {
                    BPF_JEQ => accumulator == step.k,
                    BPF_JGT => accumulator > step.k,
                    BPF_JGE => accumulator >= step.k,
                    how => panic!("unknown condition {how:#x}"),
                };
                at += usize::from(if holds { step.jt } else { step.jf });
            } else {
                panic!("unknown step {:#x}", step.code);
            }
        }
    }

    fn all() -> Vec<BpfProgram> {
        let removals = [Removal::Nothing, Removal::InFolder(7), Removal::Anything];
        let mut kinds: Vec<Kind<'_>> = removals.into_iter().map(Kind::Main).collect();
        kinds.extend([Kind::Protocol, Kind::Worker(&POLICY)]);
        kinds.into_iter().map(|kind| filter(kind).unwrap()).collect()
    }

    #[test]
    fn no_thread_can_open_connect_execute_or_fork() {
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
            libc::SYS_kill,
            libc::SYS_pidfd_send_signal,
        ];
        for program in all() {
            assert!(forbidden.iter().all(|number| !is_allowed(&program, *number, [0; 3])));
            assert!(is_allowed(&program, libc::SYS_read, [9, 8, 7]));
        }
    }

    #[test]
    fn a_thread_can_abort_its_own_process_and_signal_nobody() {
        let own = u64::from(process::id());
        let (abort, kill) = (6, 9);
        for program in all() {
            assert!(is_allowed(&program, libc::SYS_tgkill, [own, own + 1, abort]));
            assert!(!is_allowed(&program, libc::SYS_tgkill, [own, own, kill]));
            assert!(!is_allowed(&program, libc::SYS_tgkill, [1, 1, abort]));
        }
    }

    #[test]
    fn only_a_main_thread_with_something_to_remove_can_remove_it() {
        let unlinks = |kind, folder, flags| {
            let program = filter(kind).unwrap();
            let stats = is_allowed(&program, libc::SYS_newfstatat, [folder, 0, 0]);
            let unlinks = is_allowed(&program, libc::SYS_unlinkat, [folder, 0, flags]);
            assert!(flags != 0 || stats == unlinks);
            unlinks
        };
        let directory = u64::from(libc::AT_REMOVEDIR.cast_unsigned());
        assert!(unlinks(Kind::Main(Removal::InFolder(7)), 7, 0));
        assert!(!unlinks(Kind::Main(Removal::InFolder(7)), 7, directory));
        assert!(!unlinks(Kind::Main(Removal::InFolder(7)), 8, 0));
        assert!(!unlinks(Kind::Main(Removal::Nothing), 7, 0));
        assert!(unlinks(Kind::Main(Removal::Anything), 8, 0));
        assert!(!unlinks(Kind::Protocol, 7, 0));
        assert!(!unlinks(Kind::Worker(&POLICY), 7, 0));
        assert!(all().iter().all(|program| !is_allowed(program, libc::SYS_unlink, [0; 3])));
    }

    #[test]
    fn only_a_worker_makes_the_device_s_own_ioctls_and_nobody_any_other() {
        for (kind, has_it) in [(Kind::Protocol, false), (Kind::Worker(&POLICY), true)] {
            let program = filter(kind).unwrap();
            assert_eq!(is_allowed(&program, libc::SYS_ioctl, [3, 0x1234, 0]), has_it);
            assert!(is_allowed(&program, libc::SYS_ioctl, [3, libc::FIONBIO, 0]));
            assert!(!is_allowed(&program, libc::SYS_ioctl, [3, libc::TIOCSTI, 0]));
        }
    }

    #[test]
    fn no_memory_becomes_executable() {
        for program in all() {
            assert!(is_allowed(&program, libc::SYS_mmap, [0, 4096, 3]));
            assert!(!is_allowed(&program, libc::SYS_mmap, [0, 4096, 7]));
            assert!(!is_allowed(&program, libc::SYS_mprotect, [0, 4096, 5]));
        }
    }
}
