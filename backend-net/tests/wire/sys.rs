#![expect(unsafe_code, reason = "ioctls and socket options that no safe wrapper has")]
//! The tests' system calls on network interfaces, one a function.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::thread::{UnshareFlags, unshare_unsafe};

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A network namespace of the calling thread's own, and of the programs it starts.
pub(crate) fn own_network() -> io::Result<()> {
    // SAFETY: no `FILES` among the flags, so all threads go on sharing their descriptors.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Binds a packet socket to one interface.
pub(crate) fn bind_packet(socket: BorrowedFd<'_>, interface: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).expect("it is 17"),
        sll_protocol: every_protocol(),
        sll_ifindex: i32::try_from(interface).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).expect("it is 20");
    // SAFETY: `address` is a socket address of `len` bytes.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    done(result)
}

/// `ETH_P_ALL`, in network byte order.
pub(crate) fn every_protocol() -> u16 {
    u16::try_from(libc::ETH_P_ALL).expect("it is 3").to_be()
}

/// Puts a `virtio_net_hdr` before each frame of a packet socket.
pub(crate) fn set_packet_headers(socket: BorrowedFd<'_>) -> io::Result<()> {
    const PACKET_VNET_HDR: libc::c_int = 15;
    let on: libc::c_int = 1;
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("it is 4");
    // SAFETY: the option's value is an `int` of `len` bytes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_VNET_HDR,
            (&raw const on).cast(),
            len,
        )
    };
    done(result)
}

fn request(name: &str, flags: i16) -> libc::ifreq {
    let mut chars = [0; libc::IFNAMSIZ];
    for (to, from) in chars.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    libc::ifreq { ifr_name: chars, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } }
}

/// Takes an interface up or down.
pub(crate) fn set_up(socket: BorrowedFd<'_>, name: &str, up: bool) -> io::Result<()> {
    let flags = if up { i16::try_from(libc::IFF_UP).expect("it is 1") } else { 0 };
    let request = request(name, flags);
    // SAFETY: the ioctl reads one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    done(result)
}

/// Attaches a descriptor of `/dev/net/tun` to an interface.
pub(crate) fn attach_tap(tun: BorrowedFd<'_>, name: &str, flags: i32) -> io::Result<()> {
    let mut request = request(name, i16::try_from(flags).map_err(io::Error::other)?);
    // SAFETY: the ioctl reads and writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    done(result)
}

/// Lets an interface live on without a descriptor, or not.
pub(crate) fn set_persistent(tun: BorrowedFd<'_>, persistent: bool) -> io::Result<()> {
    let argument = libc::c_ulong::from(persistent);
    // SAFETY: the ioctl takes a number and no pointer.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, argument) };
    done(result)
}
