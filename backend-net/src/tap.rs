//! The host's end: one descriptor for each queue pair of a tap (or macvtap) interface.
//!
//! Everything that needs a right or a name happens in [`open`] and [`inherited`], before the jail
//! closes. Frames move without being copied.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use backend_daemon::ring::Segment;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open as open_file};

use crate::header::{Features, HEADER_BYTES};
use crate::sys;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

/// Why a tap can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// `/dev/net/tun` can't be opened.
    #[error("open /dev/net/tun")]
    Open(#[source] io::Error),
    /// The interface can't be made or attached to.
    #[error(
        "attach to tap interface {name} with {queues} queue(s): it may be in use, made with another \
         number of queues, or CAP_NET_ADMIN is missing"
    )]
    Attach {
        /// The interface.
        name: String,
        /// How many queues were wanted.
        queues: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The inherited descriptor is no tap.
    #[error("descriptor {number} is no tap or macvtap")]
    NotTap {
        /// Its place in the list given, from 0.
        number: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The inherited descriptor's mode is not the one that is needed.
    #[error(
        "interface {name} has flags {flags:#x}, but IFF_TAP, IFF_NO_PI and IFF_VNET_HDR are needed"
    )]
    Mode {
        /// The interface.
        name: String,
        /// Its flags.
        flags: i32,
    },
    /// The kernel refuses a setting.
    #[error("{what}")]
    Configure {
        /// What was to be set.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// One queue of a tap interface.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

/// `TUN_F_*` bits: what the reader of a tap can take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u32);

/// Which bit of the tap stands behind which feature, in the order in which they are probed.
/// UDP fragmentation (UFO) is left out: the kernel only emulates it since 4.14.
const OFFLOADS: [(u32, &[u32]); 5] = [
    (libc::TUN_F_CSUM, &[VIRTIO_NET_F_GUEST_CSUM]),
    (libc::TUN_F_TSO4, &[VIRTIO_NET_F_GUEST_TSO4]),
    (libc::TUN_F_TSO6, &[VIRTIO_NET_F_GUEST_TSO6]),
    (libc::TUN_F_TSO_ECN, &[VIRTIO_NET_F_GUEST_ECN]),
    // The kernel takes both or none.
    (libc::TUN_F_USO4 | libc::TUN_F_USO6, &[VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]),
];

impl Offloads {
    /// What a driver that negotiated `features` can take.
    #[must_use]
    pub fn for_driver(features: Features) -> Self {
        if !features.has(VIRTIO_NET_F_GUEST_CSUM) {
            return Self::default();
        }
        let all = |bits: &[u32]| bits.iter().all(|bit| features.has(*bit));
        let mut offloads = 0;
        for (tap_bits, feature_bits) in OFFLOADS {
            offloads |= if all(feature_bits) { tap_bits } else { 0 };
        }
        let tso = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        if offloads & tso == 0 {
            // The kernel refuses ECN without TSO.
            offloads &= !libc::TUN_F_TSO_ECN;
        }
        Self(offloads)
    }

    /// The features that this makes it possible to offer to a driver.
    #[must_use]
    pub fn features(self) -> u64 {
        let bits = OFFLOADS.iter().filter(|(tap, _)| self.0 & tap == *tap);
        bits.flat_map(|(_, features)| features.iter()).fold(0, |all, bit| all | 1 << bit)
    }

    /// Whether UDP can be segmented.
    #[must_use]
    pub fn udp_segments(self) -> bool {
        self.0 & libc::TUN_F_USO4 != 0
    }
}

/// Attaches `queues` queues to the tap interface `name`, which is made if there is none.
///
/// # Errors
///
/// Fails if the kernel refuses the interface or one of its settings.
pub fn open(name: &str, queues: usize) -> Result<Vec<Tap>, TapError> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    (0..queues)
        .map(|_| {
            let mode = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd = open_file("/dev/net/tun", mode, Mode::empty())
                .map_err(|error| TapError::Open(error.into()))?;
            sys::set_interface(fd.as_fd(), name, flags).map_err(|source| TapError::Attach {
                name: name.to_owned(),
                queues,
                source,
            })?;
            Tap::configure(fd)
        })
        .collect()
}

/// Takes over descriptors that were opened and attached by somebody else.
///
/// # Errors
///
/// Fails if one is no tap, or can't be set up as this device needs it.
pub fn inherited(fds: Vec<OwnedFd>) -> Result<Vec<Tap>, TapError> {
    let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let configure = |(number, fd): (usize, OwnedFd)| {
        // A predecessor may have detached the queue, and a detached one says nothing of itself.
        // One that is attached, or of an interface without several, refuses.
        match sys::set_queue(fd.as_fd(), true) {
            Ok(()) | Err(_) => {}
        }
        let info =
            sys::interface(fd.as_fd()).map_err(|source| TapError::NotTap { number, source })?;
        if info.flags & needed != needed {
            return Err(TapError::Mode { name: info.name, flags: info.flags });
        }
        Tap::configure(fd)
    };
    fds.into_iter().enumerate().map(configure).collect()
}

impl Tap {
    fn configure(fd: OwnedFd) -> Result<Self, TapError> {
        let failed = |what| move |source| TapError::Configure { what, source };
        let flags =
            fcntl_getfl(&fd).map_err(|error| failed("read the tap's mode")(error.into()))?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
            .map_err(|error| failed("make the tap non-blocking")(error.into()))?;
        let tap = Self { fd };
        tap.set_header_len(HEADER_BYTES).map_err(failed("set the length of the tap's header"))?;
        Ok(tap)
    }

    /// Finds out what the kernel can hand over unsegmented; the tap hands over plain frames after.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not even take plain frames.
    pub fn probe_offloads(&self) -> Result<Offloads, TapError> {
        let mut found = 0;
        for (bits, _) in OFFLOADS {
            // Asking for what the kernel does not know is how one finds out.
            if sys::set_offload(self.fd.as_fd(), found | bits).is_ok() {
                found |= bits;
            }
        }
        let configured = sys::set_offload(self.fd.as_fd(), 0);
        configured
            .map_err(|source| TapError::Configure { what: "clear the tap's offloads", source })?;
        Ok(Offloads(found))
    }

    /// Tells the interface what frames its reader can take.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        sys::set_offload(self.fd.as_fd(), offloads.0)
    }

    /// How long the header before each frame is, in bytes: 10 or 12.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_header_len(&self, len_bytes: usize) -> io::Result<()> {
        let len_bytes = i32::try_from(len_bytes).map_err(io::Error::other)?;
        sys::set_header_len(self.fd.as_fd(), len_bytes)
    }

    /// Lets the interface use this queue, or not. Only for interfaces with several queues.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        sys::set_queue(self.fd.as_fd(), attached)
    }

    /// Whether the interface is still there.
    ///
    /// # Errors
    ///
    /// What the kernel says if not.
    pub fn check(&self) -> io::Result<()> {
        sys::interface(self.fd.as_fd()).map(drop)
    }

    /// Reads one frame into `header`, then the guest's `segments`, then `spill`; gives the number
    /// of bytes, header included.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is no frame.
    pub fn read_frame(
        &self,
        header: &mut [u8],
        segments: &[Segment],
        spill: &mut [u8],
    ) -> io::Result<usize> {
        sys::read_frame(self.fd.as_fd(), header, segments, spill)
    }

    /// Writes one frame: `header`, then the guest's `segments`.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn write_frame(
        &self,
        header: &[u8],
        segments: impl Iterator<Item = Segment>,
    ) -> io::Result<usize> {
        sys::write_frame(self.fd.as_fd(), header, segments)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiated(bits: &[u32]) -> Offloads {
        Offloads::for_driver(Features(bits.iter().fold(0, |all, bit| all | 1 << bit)))
    }

    #[test]
    fn nothing_is_offloaded_without_checksums() {
        assert_eq!(negotiated(&[]), Offloads::default());
        assert_eq!(negotiated(&[VIRTIO_NET_F_GUEST_TSO4]), Offloads::default());
    }

    #[test]
    fn a_driver_gets_what_it_negotiated_and_ecn_only_with_tso() {
        let (csum, ecn) = (VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN);
        assert_eq!(negotiated(&[csum]), Offloads(libc::TUN_F_CSUM));
        assert_eq!(negotiated(&[csum, ecn]), Offloads(libc::TUN_F_CSUM));
        let tso4 = libc::TUN_F_CSUM | libc::TUN_F_TSO4;
        assert_eq!(negotiated(&[csum, VIRTIO_NET_F_GUEST_TSO4]), Offloads(tso4));
        let both = negotiated(&[csum, ecn, VIRTIO_NET_F_GUEST_TSO4]);
        assert_eq!(both, Offloads(tso4 | libc::TUN_F_TSO_ECN));
        let uso4 = negotiated(&[csum, VIRTIO_NET_F_GUEST_USO4]);
        assert!(!uso4.udp_segments(), "the kernel takes both kinds or none");
    }

    #[test]
    fn offloads_become_the_features_that_need_them() {
        let all = Offloads(OFFLOADS.iter().fold(0, |all, (bits, _)| all | bits));
        assert!(all.udp_segments());
        assert_eq!(Offloads::for_driver(Features(all.features())), all);
    }
}
