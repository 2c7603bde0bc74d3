//! The header before each frame (virtio 1.3, section 5.1.6), read once and checked.
//!
//! What a guest sends is checked against what was negotiated and against the frame, then written
//! anew: the tap never sees a byte of the guest's header. What the tap sends is checked too, for
//! it may still hold frames from before a negotiation.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

/// The header's length with `VERSION_1` or `MRG_RXBUF`, in bytes.
pub const HEADER_BYTES: usize = 12;
/// Its length for a legacy driver without `MRG_RXBUF`, in bytes: the number of buffers is missing.
pub const LEGACY_HEADER_BYTES: usize = 10;
/// The shortest frame: an Ethernet header, in bytes.
pub const MIN_FRAME_BYTES: u64 = 14;
/// The longest frame: an Ethernet header with a VLAN tag and the longest IP packet, in bytes.
pub const MAX_FRAME_BYTES: u64 = 14 + 4 + 65_535;

/// `flags`: the checksum is to be completed.
const NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum was verified.
const DATA_VALID: u8 = 2;
/// `gso_type`: not segmented.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// A bit of `gso_type`: the TCP segments carry ECN.
const GSO_ECN: u8 = 0x80;

/// The negotiated feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Whether feature number `bit` was negotiated.
    #[must_use]
    pub fn has(self, bit: u32) -> bool {
        self.0 & (1 << bit) != 0
    }
}

/// Why a frame can't pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The buffer holds no whole header and Ethernet header, or more than the longest frame.
    #[error("the frame has {len_bytes} bytes")]
    FrameLength {
        /// The frame's length without the header.
        len_bytes: u64,
    },
    /// A checksum is to be completed, which was not negotiated.
    #[error("checksum offload was not negotiated")]
    ChecksumNotNegotiated,
    /// The checksum's place lies outside the frame.
    #[error("the checksum at {start} + {offset} lies outside the frame of {len_bytes} bytes")]
    ChecksumOutside {
        /// Where the checksummed bytes start.
        start: u16,
        /// Where the checksum lies from there.
        offset: u16,
        /// The frame's length.
        len_bytes: u64,
    },
    /// The kind of segmentation is unknown or was not negotiated.
    #[error("segmentation type {gso_type:#x} was not negotiated")]
    SegmentationNotNegotiated {
        /// The header's `gso_type`.
        gso_type: u8,
    },
    /// Segmentation without a segment size, without a checksum, or with headers longer than the
    /// frame.
    #[error("segments of {gso_size} bytes after {hdr_len} make no sense")]
    Segments {
        /// The header's `gso_size`.
        gso_size: u16,
        /// The header's `hdr_len`.
        hdr_len: u16,
    },
}

/// A checked header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    /// The header of a frame of `len_bytes` bytes that a guest sends.
    ///
    /// # Errors
    ///
    /// Fails if the tap would refuse it, or if it uses what was not negotiated.
    pub fn outgoing(
        bytes: [u8; HEADER_BYTES],
        len_bytes: u64,
        features: Features,
    ) -> Result<Self, HeaderError> {
        let mut header = Self::of_frame(bytes, len_bytes)?;
        // A device ignores flags that it does not know (virtio 1.3, section 5.1.6.2.2).
        header.flags &= NEEDS_CSUM;
        if header.flags == 0 {
            (header.csum_start, header.csum_offset) = (0, 0);
        } else {
            header.check_checksum(len_bytes, features)?;
        }
        if header.gso_type == GSO_NONE {
            // The header's length is a hint for segmentation only.
            (header.hdr_len, header.gso_size) = (0, 0);
        } else {
            header.check_segments(len_bytes, Offered::OUT, features)?;
        }
        Ok(header)
    }

    /// The header of a frame of `len_bytes` bytes that the tap sends.
    ///
    /// # Errors
    ///
    /// Fails if the guest's driver did not negotiate what the frame needs.
    pub fn incoming(
        bytes: [u8; HEADER_BYTES],
        len_bytes: u64,
        features: Features,
    ) -> Result<Self, HeaderError> {
        let mut header = Self::of_frame(bytes, len_bytes)?;
        if !features.has(VIRTIO_NET_F_GUEST_CSUM) {
            // Without GUEST_CSUM the flags are zero (virtio 1.3, section 5.1.6.4.1).
            if header.flags & NEEDS_CSUM != 0 {
                return Err(HeaderError::ChecksumNotNegotiated);
            }
            header.flags = 0;
        }
        header.flags &= NEEDS_CSUM | DATA_VALID;
        if header.gso_type != GSO_NONE {
            header.check_segments(len_bytes, Offered::IN, features)?;
        }
        Ok(header)
    }

    /// The header's bytes, for a frame that lies in `buffers` buffers (0 in a guest's frame).
    #[must_use]
    pub fn encode(&self, buffers: u16) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        bytes[10..12].copy_from_slice(&buffers.to_le_bytes());
        bytes
    }

    /// The header of a frame that is not too short or too long.
    fn of_frame(bytes: [u8; HEADER_BYTES], len_bytes: u64) -> Result<Self, HeaderError> {
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&len_bytes) {
            return Err(HeaderError::FrameLength { len_bytes });
        }
        Ok(Self::parse(bytes))
    }

    fn parse(bytes: [u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    fn check_checksum(&self, len_bytes: u64, features: Features) -> Result<(), HeaderError> {
        if !features.has(VIRTIO_NET_F_CSUM) {
            return Err(HeaderError::ChecksumNotNegotiated);
        }
        let end = u64::from(self.csum_start) + u64::from(self.csum_offset) + 2;
        if end > len_bytes {
            let (start, offset) = (self.csum_start, self.csum_offset);
            return Err(HeaderError::ChecksumOutside { start, offset, len_bytes });
        }
        Ok(())
    }

    fn check_segments(
        &self,
        len_bytes: u64,
        offered: Offered,
        features: Features,
    ) -> Result<(), HeaderError> {
        let Self { flags, gso_type, hdr_len, gso_size, .. } = *self;
        let tcp = |bit| {
            let ecn = gso_type & GSO_ECN == 0 || features.has(offered.ecn);
            features.has(bit) && ecn
        };
        let negotiated = match gso_type & !GSO_ECN {
            GSO_TCPV4 => tcp(offered.tso4),
            GSO_TCPV6 => tcp(offered.tso6),
            GSO_UDP_L4 => {
                gso_type & GSO_ECN == 0 && offered.uso.iter().any(|bit| features.has(*bit))
            }
            _ => false,
        };
        if !negotiated {
            return Err(HeaderError::SegmentationNotNegotiated { gso_type });
        }
        if gso_size == 0 || flags & NEEDS_CSUM == 0 || u64::from(hdr_len) > len_bytes {
            return Err(HeaderError::Segments { gso_size, hdr_len });
        }
        Ok(())
    }
}

/// The feature bits that allow segmentation in one direction.
#[derive(Clone, Copy)]
struct Offered {
    tso4: u32,
    tso6: u32,
    ecn: u32,
    uso: [u32; 2],
}

impl Offered {
    const OUT: Self = Self {
        tso4: VIRTIO_NET_F_HOST_TSO4,
        tso6: VIRTIO_NET_F_HOST_TSO6,
        ecn: VIRTIO_NET_F_HOST_ECN,
        uso: [VIRTIO_NET_F_HOST_USO; 2],
    };
    const IN: Self = Self {
        tso4: VIRTIO_NET_F_GUEST_TSO4,
        tso6: VIRTIO_NET_F_GUEST_TSO6,
        ecn: VIRTIO_NET_F_GUEST_ECN,
        uso: [VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6],
    };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    const ALL: Features = Features(u64::MAX);
    const NOTHING: Features = Features(0);

    /// flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
    fn bytes(flags: u8, gso_type: u8, words: [u16; 4]) -> [u8; HEADER_BYTES] {
        let [hdr_len, gso_size, csum_start, csum_offset] = words;
        Header { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset }.encode(9)
    }

    #[test]
    fn a_plain_frame_passes_with_nothing_negotiated_and_its_hints_are_forgotten() {
        let header = Header::outgoing(bytes(0, 0, [7, 7, 7, 7]), 60, NOTHING);
        assert_eq!(header, Ok(Header::default()));
    }

    #[test]
    fn unknown_flags_are_ignored() {
        let header = Header::outgoing(bytes(0xfe, 0, [0; 4]), 60, NOTHING).unwrap();
        assert_eq!(header.encode(0), [0; HEADER_BYTES]);
    }

    #[test]
    fn a_frame_is_no_shorter_than_its_ethernet_header_and_no_longer_than_the_longest_packet() {
        let plain = bytes(0, 0, [0; 4]);
        for (len_bytes, passes) in [
            (0, false),
            (13, false),
            (14, true),
            (MAX_FRAME_BYTES, true),
            (MAX_FRAME_BYTES + 1, false),
        ] {
            assert_eq!(Header::outgoing(plain, len_bytes, ALL).is_ok(), passes, "{len_bytes}");
        }
    }

    #[test]
    fn a_checksum_lies_inside_the_frame_and_was_negotiated() {
        let checksum = bytes(1, 0, [0, 0, 34, 16]);
        assert!(Header::outgoing(checksum, 52, ALL).is_ok());
        assert!(matches!(
            Header::outgoing(checksum, 51, ALL),
            Err(HeaderError::ChecksumOutside { start: 34, offset: 16, len_bytes: 51 })
        ));
        let wrapping = bytes(1, 0, [0, 0, 0xffff, 0xffff]);
        assert!(Header::outgoing(wrapping, 1000, ALL).is_err());
        let none = Header::outgoing(checksum, 52, NOTHING);
        assert_eq!(none, Err(HeaderError::ChecksumNotNegotiated));
    }

    #[test]
    fn segmentation_needs_its_feature_a_size_and_a_checksum() {
        let tso = |flags, kind, hdr_len, size| {
            Header::outgoing(bytes(flags, kind, [hdr_len, size, 34, 16]), 3000, ALL).is_ok()
        };
        assert!(tso(1, GSO_TCPV4, 54, 1448));
        assert!(tso(1, GSO_TCPV6 | GSO_ECN, 74, 1428));
        assert!(tso(1, GSO_UDP_L4, 42, 1472));
        assert!(!tso(1, GSO_TCPV4, 54, 0), "no size");
        assert!(!tso(0, GSO_TCPV4, 54, 1448), "no checksum");
        assert!(!tso(1, GSO_TCPV4, 3001, 1448), "headers longer than the frame");
        assert!(!tso(1, 3, 54, 1448), "UDP fragmentation is never offered");
        assert!(!tso(1, GSO_UDP_L4 | GSO_ECN, 42, 1472), "ECN is TCP's");
        assert!(!tso(1, GSO_ECN, 42, 1472), "ECN of nothing");
        let only_checksum = Features(1 << VIRTIO_NET_F_CSUM);
        let header = Header::outgoing(bytes(1, GSO_TCPV4, [54, 1448, 34, 16]), 3000, only_checksum);
        assert_eq!(header, Err(HeaderError::SegmentationNotNegotiated { gso_type: GSO_TCPV4 }));
    }

    #[test]
    fn what_the_driver_can_not_take_does_not_come_in() {
        let needs = bytes(1, 0, [0, 0, 34, 16]);
        assert!(Header::incoming(needs, 60, NOTHING).is_err());
        let valid = Header::incoming(bytes(2, 0, [0; 4]), 60, NOTHING).unwrap();
        assert_eq!(valid.encode(1)[0], 0, "no flags without GUEST_CSUM");
        let big = bytes(1, GSO_TCPV4, [54, 1448, 34, 16]);
        let checksum = Features(1 << VIRTIO_NET_F_GUEST_CSUM);
        assert!(Header::incoming(big, 9000, checksum).is_err());
        let both = Features(checksum.0 | 1 << VIRTIO_NET_F_GUEST_TSO4);
        assert_eq!(Header::incoming(big, 9000, both).unwrap().encode(3)[10..], [3, 0]);
    }

    proptest! {
        #[test]
        fn whatever_passes_lies_in_its_frame_and_was_negotiated(
            raw: [u8; HEADER_BYTES],
            len_bytes in 0_u64..70_000,
            bits: u64,
            known in 0_u8..6,
        ) {
            let mut likely = raw;
            (likely[0], likely[1]) = (raw[0] & 3, known);
            for bytes in [raw, likely] {
                if let Ok(header) = Header::outgoing(bytes, len_bytes, Features(bits)) {
                    let checksum = header.flags & NEEDS_CSUM != 0;
                    let end = u64::from(header.csum_start) + u64::from(header.csum_offset);
                    prop_assert!(!checksum || end + 2 <= len_bytes);
                    prop_assert!(!checksum || Features(bits).has(VIRTIO_NET_F_CSUM));
                    prop_assert!(u64::from(header.hdr_len) <= len_bytes);
                    prop_assert_eq!(header.flags & !NEEDS_CSUM, 0);
                }
                if let Ok(header) = Header::incoming(bytes, len_bytes, Features(bits)) {
                    prop_assert!(header.flags == 0 || Features(bits).has(VIRTIO_NET_F_GUEST_CSUM));
                }
            }
        }
    }
}
