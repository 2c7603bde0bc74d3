//! What system calls each kind of thread may make; anything else kills the process.
//!
//! The lists are what the threads need and no more: no thread here ever opens, connects, binds or
//! executes, and none maps memory executable. A vCPU thread may ask KVM for nothing but to run and
//! to set that vCPU's own state, and for what a driver's writes to a device's registers bring
//! about: routes, irqfds and ioeventfds. Where a
//! device of the host's is there or may come, it may also move that device's BARs (memory slots),
//! read and write its registers, and switch its interrupts on.

use std::mem::size_of;
use std::process;

use kvm_bindings as kvm;
use libc::c_long;
use rustix::fs::MemfdFlags;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
#[error("a list of system calls does not compile")]
pub struct SeccompError(#[from] BackendError);

const KVM_IOCTL: u64 = 0xae;
const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

/// An ioctl's number from its parts, as in Linux's `asm-generic/ioctl.h`.
const fn kvm_ioctl(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | KVM_IOCTL << 8 | number
}

const F_GETFD: u64 = 1;
const F_DUPFD_CLOEXEC: u64 = 1030;
const F_ADD_SEALS: u64 = 1033;
const KVM_RUN: u64 = kvm_ioctl(NONE, 0x80, 0);

/// A vCPU's state, for resets and for the log of a crash.
const VCPU_STATE: [u64; 17] = [
    kvm_ioctl(READ, 0x81, size_of::<kvm::kvm_regs>()),
    kvm_ioctl(WRITE, 0x82, size_of::<kvm::kvm_regs>()),
    kvm_ioctl(READ, 0x83, size_of::<kvm::kvm_sregs>()),
    kvm_ioctl(WRITE, 0x84, size_of::<kvm::kvm_sregs>()),
    kvm_ioctl(READ_WRITE, 0x88, size_of::<kvm::kvm_msrs>()),
    kvm_ioctl(WRITE, 0x89, size_of::<kvm::kvm_msrs>()),
    kvm_ioctl(READ, 0x8c, size_of::<kvm::kvm_fpu>()),
    kvm_ioctl(WRITE, 0x8d, size_of::<kvm::kvm_fpu>()),
    kvm_ioctl(READ, 0x8e, size_of::<kvm::kvm_lapic_state>()),
    kvm_ioctl(WRITE, 0x8f, size_of::<kvm::kvm_lapic_state>()),
    kvm_ioctl(READ, 0x98, size_of::<kvm::kvm_mp_state>()),
    kvm_ioctl(WRITE, 0x99, size_of::<kvm::kvm_mp_state>()),
    kvm_ioctl(WRITE, 0xa0, size_of::<kvm::kvm_vcpu_events>()),
    kvm_ioctl(WRITE, 0xa2, size_of::<kvm::kvm_debugregs>()),
    kvm_ioctl(WRITE, 0xa7, size_of::<kvm::kvm_xcrs>()),
    kvm_ioctl(READ, 0x9f, size_of::<kvm::kvm_vcpu_events>()),
    kvm_ioctl(READ, 0xa1, size_of::<kvm::kvm_debugregs>()),
];

/// What moving BARs and masking vectors comes down to.
const VM_WIRING: [u64; 3] = [
    kvm_ioctl(WRITE, 0x6a, size_of::<kvm::kvm_irq_routing>()),
    kvm_ioctl(WRITE, 0x76, size_of::<kvm::kvm_irqfd>()),
    kvm_ioctl(WRITE, 0x79, size_of::<kvm::kvm_ioeventfd>()),
];

/// What a driver's writes to a passed-through device's registers come down to.
const MEMORY_SLOTS: [u64; 1] =
    [kvm_ioctl(WRITE, 0x46, size_of::<kvm::kvm_userspace_memory_region>())];

/// KVM's knowledge of passed-through devices.
const KVM_DEVICES: [u64; 2] = [
    kvm_ioctl(READ_WRITE, 0xe0, size_of::<kvm::kvm_create_device>()),
    kvm_ioctl(WRITE, 0xe1, size_of::<kvm::kvm_device_attr>()),
];

/// The interrupt controllers' state, for resets.
const VM_STATE: [u64; 1] = [kvm_ioctl(READ, 0x63, size_of::<kvm::kvm_irqchip>())];

/// What any Rust thread needs: memory, locks, time, its own end, and to write (a log line, an
/// eventfd, the serial port).
const EVERY_THREAD: [c_long; 22] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_ppoll,
    libc::SYS_preadv2,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// The control thread's own: its loop, its sockets, the files it loads again after a reset.
const CONTROL_THREAD: [c_long; 15] = [
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_writev,
];

type Rules = Vec<(c_long, Vec<SeccompRule>)>;

fn argument_is(index: u8, value: u64) -> Result<SeccompRule, BackendError> {
    let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
    SeccompRule::new(vec![SeccompCondition::new(index, length, equal, value)?])
}

/// The request of an ioctl, the command of a fcntl.
fn second_argument_is(value: u64) -> Result<SeccompRule, BackendError> {
    argument_is(1, value)
}

/// Signals may be sent to this process's own threads.
fn own_threads() -> Result<Rules, BackendError> {
    Ok(vec![(libc::SYS_tgkill, vec![argument_is(0, process::id().into())?])])
}

/// Memory files may be made that can be sealed and, where the kernel knows that, never executed.
fn memory_files() -> Result<(c_long, Vec<SeccompRule>), BackendError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flags = [flags, flags | MemfdFlags::NOEXEC_SEAL];
    let rules = flags.into_iter().map(|flags| argument_is(1, flags.bits().into()));
    Ok((libc::SYS_memfd_create, rules.collect::<Result<_, _>>()?))
}

/// Memory may be mapped, but never to execute it.
fn not_executable() -> Result<SeccompRule, BackendError> {
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    let none = SeccompCmpOp::MaskedEq(executable);
    SeccompRule::new(vec![SeccompCondition::new(2, SeccompCmpArgLen::Dword, none, 0)?])
}

fn compile(
    calls: &[&[c_long]],
    fcntls: &[u64],
    ioctls: &[&[u64]],
    more: Rules,
) -> Result<BpfProgram, SeccompError> {
    let mut rules: Rules = calls.concat().into_iter().map(|call| (call, Vec::new())).collect();
    rules.extend(more);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.push((call, vec![not_executable()?]));
    }
    // The standard library asks for a descriptor's flags before it closes it, F_GETFD.
    let fcntls: Result<Vec<_>, _> = fcntls.iter().copied().map(second_argument_is).collect();
    rules.push((libc::SYS_fcntl, fcntls?));
    let ioctls: Result<Vec<_>, _> = ioctls.concat().into_iter().map(second_argument_is).collect();
    rules.push((libc::SYS_ioctl, ioctls?));
    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

/// A vCPU thread's filter, for a VM with or without passed-through devices.
///
/// # Errors
///
/// Fails if the list is malformed.
pub fn vcpu_filter(passthrough: bool) -> Result<BpfProgram, SeccompError> {
    let mut calls: Vec<&[c_long]> = vec![&EVERY_THREAD];
    let mut ioctls: Vec<&[u64]> = vec![&[KVM_RUN], &VCPU_STATE, &VM_WIRING];
    if passthrough {
        calls.push(&[libc::SYS_pread64, libc::SYS_pwrite64]);
        ioctls.extend([&MEMORY_SLOTS[..], &vfio::IOCTLS_OF_DRIVERS]);
    }
    compile(&calls, &[F_GETFD], &ioctls, Vec::new())
}

/// A pair of sockets for a backend's channel: it is connected with nothing but itself.
fn local_pairs() -> Result<(c_long, Vec<SeccompRule>), BackendError> {
    let local = u64::from(libc::AF_UNIX.unsigned_abs());
    Ok((libc::SYS_socketpair, vec![argument_is(0, local)?]))
}

/// The control thread's filter.
///
/// # Errors
///
/// Fails if the list is malformed.
pub fn control_filter() -> Result<BpfProgram, SeccompError> {
    // Restoring a terminal's mode at the end.
    let terminal = [libc::TCSETS, libc::TCSETSW, libc::TCGETS];
    // A new backend's socket.
    let socket = [libc::FIONBIO];
    let fcntls = [F_GETFD, F_DUPFD_CLOEXEC, F_ADD_SEALS];
    let ioctls: [&[u64]; 7] = [
        &VM_WIRING,
        &VM_STATE,
        &terminal,
        &socket,
        &MEMORY_SLOTS,
        &KVM_DEVICES,
        &vfio::IOCTLS_AT_RUN_TIME,
    ];
    let mut more = own_threads()?;
    more.push(memory_files()?);
    more.push(local_pairs()?);
    compile(&[&EVERY_THREAD, &CONTROL_THREAD], &fcntls, &ioctls, more)
}

/// The filter of the thread that ends conversations with backends.
///
/// # Errors
///
/// Fails if the list is malformed.
pub fn watchdog_filter() -> Result<BpfProgram, SeccompError> {
    compile(&[&EVERY_THREAD, &[libc::SYS_shutdown]], &[F_GETFD], &[], Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_documented_ones() {
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(i32::try_from(F_GETFD), Ok(libc::F_GETFD));
        assert_eq!(i32::try_from(F_DUPFD_CLOEXEC), Ok(libc::F_DUPFD_CLOEXEC));
        assert_eq!(i32::try_from(F_ADD_SEALS), Ok(libc::F_ADD_SEALS));
        // As `strace` prints them.
        assert_eq!(VCPU_STATE[1], 0x4090_ae82);
        assert_eq!(VCPU_STATE[9], 0x4400_ae8f);
        assert_eq!(MEMORY_SLOTS, [0x4020_ae46]);
        assert_eq!(KVM_DEVICES, [0xc00c_aee0, 0x4018_aee1]);
        assert_eq!(VM_WIRING, [0x4008_ae6a, 0x4020_ae76, 0x4040_ae79]);
    }

    #[test]
    fn all_filters_compile() {
        assert!(!vcpu_filter(false).unwrap().is_empty());
        assert!(!vcpu_filter(true).unwrap().is_empty());
        assert!(!watchdog_filter().unwrap().is_empty());
        assert!(!control_filter().unwrap().is_empty());
    }
}
