#![expect(
    unsafe_code,
    reason = "what a child does before its exec, the tap ioctl, fork, mount_setattr"
)]
//! The system calls that no safe crate offers: one a function, owned safe types out.

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use tokio::io::{Interest, unix::AsyncFd};

use rustix::{
    fs::{Mode, OFlags},
    io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd},
    process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal},
};

/// Makes the child of `command` inherit `inherit` under the same numbers, join the cgroup whose
/// `cgroup.procs` is given, lead a process group of its own, and die with this thread.
///
/// The descriptors stay close-on-exec in this process, so no other child gets them, and close here
/// when `command` is dropped.
pub(crate) fn prepare(command: &mut Command, inherit: Vec<OwnedFd>, cgroup: Option<OwnedFd>) {
    let parent = getpid();
    command.process_group(0);
    let before_exec = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() != Some(parent) {
            // The parent died before the request above: nobody would end this process.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        if let Some(procs) = &cgroup {
            rustix::io::write(procs, b"0")?;
        }
        for fd in &inherit {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: `pre_exec` asks that the closure be async-signal-safe: it makes plain system calls,
    // allocates nothing, takes no lock, and its captures were made before the fork.
    unsafe { command.pre_exec(before_exec) };
}

/// Makes the child of `command` find `handed` at descriptors 3, 4 and 5, in a process group of its own.
///
/// # Errors
///
/// Fails if there are no more descriptors.
pub(crate) fn hand_in_from_three(command: &mut Command, handed: [OwnedFd; 3]) -> io::Result<()> {
    // Beyond the places to be filled, so that none is overwritten before it is copied.
    let above = |fd: OwnedFd| fcntl_dupfd_cloexec(fd, 6);
    let [first, second, third] = handed;
    let sources = [above(first)?, above(second)?, above(third)?];
    command.process_group(0);
    let before_exec = move || {
        for (source, number) in sources.iter().zip(3..) {
            // SAFETY: plain numbers; the copies are the child's own and without close-on-exec, and
            // what was open in their places is closed by the kernel, close-on-exec like all here.
            if unsafe { libc::dup2(source.as_raw_fd(), number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: `pre_exec` asks that the closure be async-signal-safe: it makes plain system calls,
    // allocates nothing, takes no lock, and its captures were made before the fork.
    unsafe { command.pre_exec(before_exec) };
    Ok(())
}

/// Makes a tap interface that exists as long as the answered descriptor (or a copy) is open.
/// Frames carry a virtio-net header.
///
/// # Errors
///
/// Fails without `/dev/net/tun`, without permission, or if the name is taken.
pub(crate) fn create_tap(name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tun = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let ifru_flags =
        i16::try_from(flags).map_err(|_too_wide| io::Error::from_raw_os_error(libc::EINVAL))?;
    let request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } };
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives through the call.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(tun) }
}

/// Which side of a fork this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The caller; its child's id.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Forks a process that has one thread.
///
/// # Errors
///
/// Fails if there are several threads, whose locks the child could never take, or if the kernel
/// refuses.
pub fn fork() -> io::Result<Forked> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with several threads can't become a daemon"));
    }
    // SAFETY: this is the only thread (checked above), so the child finds no lock held by a thread
    // that it lacks.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => Ok(Forked::Child),
        _ => Pid::from_raw(pid)
            .filter(|_| pid > 0)
            .map(Forked::Parent)
            .ok_or_else(io::Error::last_os_error),
    }
}

/// Lets the runtime watch `fd` for becoming readable.
///
/// # Errors
///
/// Fails if the kernel can't poll it.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    watch(fd, Interest::READABLE)
}

/// Lets the runtime watch `fd` for becoming readable and writable.
///
/// # Errors
///
/// Fails if the kernel can't poll it.
pub(crate) fn watch_socket(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    watch(fd, Interest::READABLE | Interest::WRITABLE)
}

fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor must stay open and the same as long as it is registered: an `OwnedFd`
    // gives out one number for its whole life, and the registration owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// `mount_setattr(2)` on a mount and all mounts below it: adds `attributes` (`MOUNT_ATTR_*`), and sets
/// how mounts propagate (`MS_PRIVATE`, `MS_SLAVE`).
pub(crate) fn restrict_mount(
    mount: BorrowedFd<'_>,
    attributes: u64,
    propagation: u64,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    let change = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
    let change_bytes = size_of::<libc::mount_attr>();
    // SAFETY: the path is an empty C string, and `change` is a structure of `change_bytes` bytes
    // that the kernel reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            change_bytes,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
