#![expect(unsafe_code, reason = "ioctls of the tap, and vectored system calls on guest memory")]
//! The tap's system calls: one a function, owned safe types in and out.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use backend_daemon::ring::Segment;

/// The kernel's limit on vectors in one call.
const IOV_MAX: usize = 1024;
/// The most segments of guest memory in one frame; two vectors are the header and the spill.
pub(crate) const MAX_SEGMENTS: usize = IOV_MAX - 2;

/// What `TUNGETIFF` says of a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InterfaceInfo {
    /// The interface's name.
    pub(crate) name: String,
    /// `IFF_*` bits of the tap.
    pub(crate) flags: i32,
}

fn request(name: &str, flags: i32) -> libc::ifreq {
    let mut chars = [0; libc::IFNAMSIZ];
    for (to, from) in chars.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // The kernel reads the low 16 bits of the flags.
    let [low, high, ..] = flags.to_le_bytes();
    let ifru_flags = libc::c_short::from_le_bytes([low, high]);
    libc::ifreq { ifr_name: chars, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `TUNSETIFF`: attaches a new queue to the interface, which is made if there is none.
pub(crate) fn set_interface(fd: BorrowedFd<'_>, name: &str, flags: i32) -> io::Result<()> {
    let mut request = request(name, flags);
    // SAFETY: the ioctl reads and writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    done(result)
}

/// `TUNGETIFF`: which interface the descriptor is a queue of.
pub(crate) fn interface(fd: BorrowedFd<'_>) -> io::Result<InterfaceInfo> {
    let mut request = request("", 0);
    // SAFETY: the ioctl writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    done(result)?;
    let bytes = request.ifr_name.iter().take_while(|char| **char != 0);
    let bytes: Vec<u8> = bytes.map(|char| char.to_ne_bytes()[0]).collect();
    // SAFETY: the kernel has written the union's flags, and any bytes make a `c_short`.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let name = String::from_utf8_lossy(&bytes).into_owned();
    Ok(InterfaceInfo { name, flags: i32::from(flags) })
}

/// `TUNSETVNETHDRSZ`: how long the header before each frame is, in bytes.
pub(crate) fn set_header_len(fd: BorrowedFd<'_>, len_bytes: i32) -> io::Result<()> {
    // SAFETY: the ioctl reads one `int`, which `len_bytes` is.
    let result =
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len_bytes) };
    done(result)
}

/// `TUNSETOFFLOAD`: what frames the reader of the tap can take, as `TUN_F_*` bits.
pub(crate) fn set_offload(fd: BorrowedFd<'_>, bits: u32) -> io::Result<()> {
    let argument = libc::c_ulong::from(bits);
    // SAFETY: the ioctl takes a number and no pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, argument) };
    done(result)
}

/// `TUNSETQUEUE`: lets the interface use this queue, or not.
pub(crate) fn set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    let request = request("", flags);
    // SAFETY: the ioctl reads one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    done(result)
}

/// Reads one frame: first into `header`, then into the guest's `segments`, the rest into `spill`.
/// Gives the number of bytes, header included.
pub(crate) fn read_frame(
    fd: BorrowedFd<'_>,
    header: &mut [u8],
    segments: &[Segment],
    spill: &mut [u8],
) -> io::Result<usize> {
    let mut vectors = Vec::with_capacity(segments.len() + 2);
    vectors.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() });
    vectors.extend(segments.iter().take(MAX_SEGMENTS).map(Segment::as_iovec));
    vectors.push(libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() });
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `vectors` holds `count` vectors: two exclusive slices that live until the end of
    // this function, and guest memory that stays mapped as long as the caller's chains live.
    let read = unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(read).map_err(|_negative| io::Error::last_os_error())
}

/// Writes one frame: `header`, then the guest's `segments`.
pub(crate) fn write_frame(
    fd: BorrowedFd<'_>,
    header: &[u8],
    segments: impl Iterator<Item = Segment>,
) -> io::Result<usize> {
    let mut vectors = Vec::with_capacity(8);
    vectors
        .push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() });
    vectors.extend(segments.take(MAX_SEGMENTS).map(|segment| segment.as_iovec()));
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `vectors` holds `count` vectors: a slice that is only read, and guest memory that
    // stays mapped as long as the caller's chain lives; the kernel copes with its changing.
    let written = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(written).map_err(|_negative| io::Error::last_os_error())
}
