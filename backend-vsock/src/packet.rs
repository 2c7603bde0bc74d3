//! The bytes: one packet header as it lies in guest memory, and as a value. No state, no policy.
//!
//! A packet is a 44-byte header, little-endian, and `len` bytes of payload behind it (virtio 1.3,
//! section 5.10.6). Every value that the guest wrote is decoded, none is believed here.

/// The host's context id (virtio 1.3, section 5.10.4).
pub const HOST_CID: Cid = Cid(2);
/// The lowest context id that a guest may have; those below are reserved.
pub const FIRST_GUEST_CID: u64 = 3;
/// Length of a header, in bytes.
pub const HEADER_BYTES: usize = 44;
/// The one event: all connections are gone, and the guest's context id may have changed (virtio
/// 1.3, section 5.10.6.7).
pub const EVENT_TRANSPORT_RESET: u32 = 0;
/// The packet type of a byte stream.
pub const TYPE_STREAM: u16 = 1;

/// A context id: the address of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cid(pub u64);

/// The two ports of a connection, which name it: the host's context id and the guest's are fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

/// What a packet is for (virtio 1.3, section 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses or ends it; nothing follows.
    Reset = 3,
    /// Says which directions the sender is done with: see [`Shut`].
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Tells of `buf_alloc` and `fwd_cnt`, as every packet does, and of nothing else.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|op| op.number() == number)
    }

    /// Its number in a header.
    #[must_use]
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// Which directions one side of a connection is done with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shut {
    /// It will not receive any more.
    pub receive: bool,
    /// It will not send any more.
    pub send: bool,
}

impl Shut {
    /// The directions that a shutdown packet's flags stand for; unknown flags mean nothing.
    #[must_use]
    pub fn from_flags(flags: u32) -> Self {
        Self { receive: flags & 1 != 0, send: flags & 2 != 0 }
    }

    /// The flags of a shutdown packet.
    #[must_use]
    pub fn flags(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// Whether the side is done altogether.
    #[must_use]
    pub fn is_both(self) -> bool {
        self.receive && self.send
    }

    /// What either of two announcements said: none can be taken back.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self { receive: self.receive || other.receive, send: self.send || other.send }
    }
}

/// A packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Who sends it.
    pub src_cid: Cid,
    /// Whom it is for.
    pub dst_cid: Cid,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Length of the payload, in bytes.
    pub len_bytes: u32,
    /// The socket's type: see [`TYPE_STREAM`].
    pub kind: u16,
    /// The number of an [`Op`].
    pub op: u16,
    /// Depends on the operation.
    pub flags: u32,
    /// The sender's whole buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// How many bytes left that buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            src_cid: Cid(u64::from_le_bytes(field(bytes, 0))),
            dst_cid: Cid(u64::from_le_bytes(field(bytes, 8))),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len_bytes: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes a header.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet: the addresses turned round, the type kept.
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len_bytes: 0,
            kind: self.kind,
            op: Op::Reset.number(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_lies_in_memory_as_the_specification_says() {
        let header = Header {
            src_cid: Cid(2),
            dst_cid: Cid(0x0102_0304_0506_0708),
            src_port: 0x1112_1314,
            dst_port: 1024,
            len_bytes: 9,
            kind: TYPE_STREAM,
            op: Op::Data.number(),
            flags: 3,
            buf_alloc: 0x4_0000,
            fwd_cnt: 0xffff_ffff,
        };
        #[rustfmt::skip]
        let golden: [u8; HEADER_BYTES] = [
            2, 0, 0, 0, 0, 0, 0, 0,  8, 7, 6, 5, 4, 3, 2, 1,
            0x14, 0x13, 0x12, 0x11,  0, 4, 0, 0,  9, 0, 0, 0,
            1, 0,  5, 0,  3, 0, 0, 0,  0, 0, 4, 0,  0xff, 0xff, 0xff, 0xff,
        ];
        assert_eq!(header.to_bytes(), golden);
        assert_eq!(Header::from_bytes(&golden), header);
    }

    #[test]
    fn only_seven_numbers_are_operations() {
        let known: Vec<u16> = (0..=u16::MAX).filter(|op| Op::from_number(*op).is_some()).collect();
        assert_eq!(known, [1, 2, 3, 4, 5, 6, 7]);
    }

    proptest! {
        #[test]
        fn any_44_bytes_survive_decoding_and_encoding(bytes in any::<[u8; 32]>(), tail in any::<[u8; 12]>()) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::from_bytes(&all).to_bytes(), all);
        }

        #[test]
        fn shutdown_flags_keep_two_bits(flags in any::<u32>()) {
            prop_assert_eq!(Shut::from_flags(flags).flags(), flags & 3);
        }
    }
}
