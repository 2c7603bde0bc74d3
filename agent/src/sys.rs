//! The system calls that need unsafe code; owned, safe types come out.
#![expect(unsafe_code, reason = "system calls that neither std nor rustix wraps safely")]

use std::{
    io::{self, Error},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use libc::{c_int, c_long, sock_filter, sock_fprog};
use rustix::{
    process::Pid,
    thread::{UnshareFlags, unshare_unsafe},
};
use tokio::io::unix::AsyncFd;

/// `RNDADDENTROPY` of linux/random.h.
const RND_ADD_ENTROPY: libc::Ioctl = 0x4008_5203;
/// `BLKROSET` of linux/fs.h.
const BLK_SET_READ_ONLY: libc::Ioctl = 0x125d;
/// The most bytes credited at once.
pub(crate) const SEED_BYTES_MAX: usize = 512;

/// `struct rand_pool_info` with room for the largest seed.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: c_int,
    size_bytes: c_int,
    seed: [u8; SEED_BYTES_MAX],
}

fn checked(result: c_long) -> io::Result<()> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Mixes `seed` into the kernel's pool behind `random` and credits all its bits.
///
/// # Errors
///
/// Fails if the seed is longer than [`SEED_BYTES_MAX`] or the kernel refuses.
pub(crate) fn add_entropy(random: impl AsFd, seed: &[u8]) -> io::Result<()> {
    let too_long = || Error::other("the seed is longer than 512 bytes");
    let size_bytes = c_int::try_from(seed.len()).map_err(|_error| too_long())?;
    let mut info =
        RandPoolInfo { entropy_bits: size_bytes * 8, size_bytes, seed: [0; SEED_BYTES_MAX] };
    info.seed.get_mut(..seed.len()).ok_or_else(too_long)?.copy_from_slice(seed);
    let info: *const RandPoolInfo = &raw const info;
    // SAFETY: the descriptor is open for the whole call, and `info` is a `rand_pool_info` whose
    // `size_bytes` bytes of data are inside it; the kernel only reads it.
    let result = unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RND_ADD_ENTROPY, info) };
    checked(result.into())
}

/// Makes a block device refuse writes, whoever opens it.
///
/// # Errors
///
/// Fails if `disk` is no block device or the kernel refuses.
pub(crate) fn set_disk_read_only(disk: impl AsFd) -> io::Result<()> {
    let on: c_int = 1;
    let on: *const c_int = &raw const on;
    // SAFETY: the descriptor is open for the whole call, and the kernel reads one int at `on`.
    let result = unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), BLK_SET_READ_ONLY, on) };
    checked(result.into())
}

/// Sends any signal, also a real-time one, to the process behind `pidfd`.
///
/// # Errors
///
/// Fails with `ESRCH` if the process has ended, or if the signal is out of range.
pub(crate) fn signal_pidfd(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the descriptor is open for the whole call; a null `siginfo` asks for the default.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            info,
            0 as libc::c_uint,
        )
    };
    checked(result)
}

/// Sends any signal, also a real-time one, to a process by number.
///
/// # Errors
///
/// Fails with `ESRCH` if there is no such process, or if the signal is out of range.
pub(crate) fn signal_pid(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill(2) touches no memory of this process.
    let result = unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) };
    checked(result.into())
}

/// Has the kernel reap this process's children as they end.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub(crate) fn let_kernel_reap() -> io::Result<()> {
    // SAFETY: no handler is installed: the signal is ignored from now on.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(Error::last_os_error()) } else { Ok(()) }
}

/// The head of `union bpf_attr` for `BPF_PROG_LOAD` (linux/bpf.h).
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// The head of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// Has the kernel ask `program` at each use of a device by a process of the control group, in the
/// place of the program that it asked before.
///
/// # Errors
///
/// Fails if the kernel does not accept the program.
pub(crate) fn attach_device_program(group: impl AsFd, program: &[u64]) -> io::Result<()> {
    let count = u32::try_from(program.len()).map_err(Error::other)?;
    let license = c"GPL";
    let load = ProgramLoad {
        program_type: 15,
        instruction_count: count,
        instructions: program.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
    };
    let load: *const ProgramLoad = &raw const load;
    // SAFETY: the kernel reads as many bytes as it is told there are, `count` instructions of eight
    // bytes and a text with its end, all of which outlive the call; it writes nothing.
    let loaded = unsafe { libc::syscall(libc::SYS_bpf, 5, load, size_of::<ProgramLoad>()) };
    checked(loaded)?;
    let number = c_int::try_from(loaded).map_err(Error::other)?;
    // SAFETY: the call returned a new descriptor, which nothing else owns.
    let loaded = unsafe { OwnedFd::from_raw_fd(number) };
    let attach = ProgramAttach {
        target: group.as_fd().as_raw_fd().cast_unsigned(),
        program: loaded.as_raw_fd().cast_unsigned(),
        attach_type: 6,
        flags: 0,
    };
    let attach: *const ProgramAttach = &raw const attach;
    // SAFETY: both descriptors are open for the whole call, and the kernel reads as many bytes as it
    // is told there are; it writes nothing.
    let attached = unsafe { libc::syscall(libc::SYS_bpf, 8, attach, size_of::<ProgramAttach>()) };
    checked(attached)
}

/// Installs a seccomp filter on the calling thread.
///
/// # Errors
///
/// Fails if the program is too long, or without both no_new_privs and `CAP_SYS_ADMIN`.
pub(crate) fn install_seccomp(program: &[sock_filter], flags: u32) -> io::Result<()> {
    let len = u16::try_from(program.len())
        .map_err(|_error| Error::other("the seccomp program is longer than 65,535 instructions"))?;
    let program = sock_fprog { len, filter: program.as_ptr().cast_mut() };
    let program: *const sock_fprog = &raw const program;
    // SAFETY: `program` names `len` instructions that outlive the call; the kernel copies them and
    // never writes through the pointer.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, program) };
    checked(result)
}

/// Moves this thread into new namespaces, or parts it from what its process shares. For mount
/// namespaces it must be its process's only one.
///
/// # Errors
///
/// Fails without the capability for it.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    assert!(!flags.contains(UnshareFlags::FILES), "threads would lose sight of descriptors");
    // SAFETY: the one requirement is about `FILES`, which is asserted not to be asked for.
    Ok(unsafe { unshare_unsafe(flags) }?)
}

/// Hands a non-blocking descriptor to the runtime that this is called in.
///
/// # Errors
///
/// Fails if it can't be polled.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, names the same description for as long as it lives, and is
    // moved into the `AsyncFd`.
    Ok(unsafe { AsyncFd::register(fd) }?)
}
