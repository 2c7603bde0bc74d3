#![expect(
    unsafe_code,
    reason = "network namespaces, taps, NVMe commands, what a child inherits, the time-stamp counter"
)]
//! The framework's own system calls.

use std::arch::x86_64::_rdtsc;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};

/// `unshare(CLONE_NEWNET)`: this thread, and what it starts, get an empty network.
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: the call takes no pointer; it changes only the calling thread's network namespace.
    match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A raw `AF_PACKET` socket for all protocols, bound to the interface called `name`.
pub(crate) fn packet_socket(name: &str) -> io::Result<OwnedFd> {
    let all = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be();
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes no pointer.
    let socket = unsafe { libc::socket(libc::AF_PACKET, flags, i32::from(all)) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let name = CString::new(name).map_err(io::Error::other)?;
    // SAFETY: `name` is a C string that lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let index = i32::try_from(index).map_err(io::Error::other)?;
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
        sll_protocol: all,
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: `address` is an initialised sockaddr_ll of `len` bytes that lives through the call.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `fcntl(F_DUPFD_CLOEXEC)` of a descriptor that is known by its number only.
pub(crate) fn duplicate(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointer; a number that is no descriptor gives EBADF.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Lets a program that is started by this command have `fds`, under the numbers that they have
/// here. They stay open here as long as the command lives.
pub(crate) fn hand_in(command: &mut Command, fds: Vec<OwnedFd>) {
    let before_exec = move || {
        for fd in &fds {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: `pre_exec` asks that the closure be async-signal-safe: it makes plain system calls,
    // allocates nothing, takes no lock, and its captures were made before the fork.
    unsafe { command.pre_exec(before_exec) };
}

/// Makes a tap called `name` that exists as long as the descriptor or a copy is open. Its frames
/// carry a virtio-net header.
pub(crate) fn tap(name: &str) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the path is a C string that lives for ever.
    let tap = unsafe { libc::open(c"/dev/net/tun".as_ptr(), flags) };
    if tap < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nothing else owns it.
    let tap = unsafe { OwnedFd::from_raw_fd(tap) };
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let ifru_flags = i16::try_from(kind).map_err(io::Error::other)?;
    let request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } };
    // SAFETY: the call reads and writes one `ifreq`, which lives through it.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw const request) } {
        0 => Ok(tap),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct nvme_admin_cmd` of linux include/uapi/linux/nvme_ioctl.h.
#[repr(C)]
#[derive(Default)]
struct NvmeAdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_bytes: u32,
    data_bytes: u32,
    /// Words 10 to 15 of the command.
    arguments: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

const _: () = assert!(size_of::<NvmeAdminCommand>() == 72);

/// `NVME_IOCTL_ADMIN_CMD`, `_IOWR('N', 0x41, struct nvme_admin_cmd)`.
const NVME_ADMIN_COMMAND: libc::c_ulong = 0xc048_4e41;
/// Virtualization Management (NVMe 1.4, section 5.22).
const NVME_VIRTUALIZATION: u8 = 0x1c;

/// Has an NVMe controller do `action` with `count` of `resource` for the secondary controller
/// `secondary`.
pub(crate) fn nvme_virtualization(
    controller: &File,
    secondary: u32,
    action: u32,
    resource: u32,
    count: u32,
) -> io::Result<()> {
    let mut command = NvmeAdminCommand { opcode: NVME_VIRTUALIZATION, ..Default::default() };
    command.arguments[0] = secondary << 16 | resource << 8 | action;
    command.arguments[1] = count;
    let pointer = &raw mut command;
    // SAFETY: the call reads and writes one command, which lives through it and names no buffer.
    match unsafe { libc::ioctl(controller.as_raw_fd(), NVME_ADMIN_COMMAND, pointer) } {
        0 => Ok(()),
        status if status > 0 => Err(io::Error::other(format!("NVMe status {status:#x}"))),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The processor's time-stamp counter.
pub(crate) fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has it, and Linux lets programs read it.
    unsafe { _rdtsc() }
}
