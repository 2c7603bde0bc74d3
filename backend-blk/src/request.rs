//! What a guest asks of the disk: the request's header, checked against the disk's limits.
//!
//! Pure: no file, no memory. Layout and rules are those of virtio 1.3, section 5.2.6.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

/// The protocol's unit, whatever the disk's own block size is.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// The header in front of every request.
pub(crate) const HEADER_BYTES: u64 = 16;
/// A range of a discard or write-zeroes request.
pub(crate) const RANGE_BYTES: u64 = 16;
/// The most sectors that one discard or write-zeroes request may cover.
pub(crate) const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// The most bytes that one request may move. The guest's used length has 32 bits.
const MAX_TRANSFER_BYTES: u64 = 1 << 30;

/// The one flag of a range: the sectors may be freed.
const UNMAP: u32 = 1;

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(crate) fn byte(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(code).expect("the specification's status codes are bytes")
    }
}

/// What a disk allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) size_bytes: u64,
    /// Offsets and lengths of transfers are multiples of this.
    pub(crate) block_bytes: u64,
    pub(crate) read_only: bool,
    pub(crate) can_discard: bool,
    pub(crate) can_zero: bool,
}

/// What is left to do, all of it within the disk's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read {
        offset_bytes: u64,
        len_bytes: u64,
    },
    Write {
        offset_bytes: u64,
        len_bytes: u64,
    },
    Flush,
    /// Answer with the serial number.
    Identify,
    /// Free the range; what it then reads as is undefined.
    Discard {
        offset_bytes: u64,
        len_bytes: u64,
    },
    /// Make the range read as zeroes, and free it if that is allowed.
    Zero {
        offset_bytes: u64,
        len_bytes: u64,
        unmap: bool,
    },
}

/// A request's header, as the guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    kind: u32,
    sector: u64,
}

impl Header {
    pub(crate) fn parse(bytes: [u8; 16]) -> Self {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
        Self { kind: u32::from_le_bytes([k0, k1, k2, k3]), sector: u64::from_le_bytes(sector) }
    }

    /// Whether the request's data is a list of ranges.
    pub(crate) fn has_range(self) -> bool {
        matches!(self.kind, VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES)
    }

    /// The operation, given how much data the request brings and takes, in bytes.
    ///
    /// # Errors
    ///
    /// Gives the status with which the request ends at once.
    pub(crate) fn operation(
        self,
        brings: u64,
        takes: u64,
        limits: &Limits,
    ) -> Result<Operation, Status> {
        match self.kind {
            VIRTIO_BLK_T_IN => {
                let offset_bytes = transfer(self.sector, takes, limits)?;
                Ok(Operation::Read { offset_bytes, len_bytes: takes })
            }
            VIRTIO_BLK_T_OUT if limits.read_only => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => {
                let offset_bytes = transfer(self.sector, brings, limits)?;
                Ok(Operation::Write { offset_bytes, len_bytes: brings })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Operation::Identify),
            _ => Err(Status::Unsupported),
        }
    }

    /// The operation on the one range of a discard or write-zeroes request.
    ///
    /// # Errors
    ///
    /// Gives the status with which the request ends at once.
    pub(crate) fn range_operation(
        self,
        range: [u8; 16],
        limits: &Limits,
    ) -> Result<Operation, Status> {
        let discard = self.kind == VIRTIO_BLK_T_DISCARD;
        let offered = if discard { limits.can_discard } else { limits.can_zero };
        if !offered {
            return Err(Status::Unsupported);
        }
        let [start @ .., c0, c1, c2, c3, f0, f1, f2, f3] = range;
        let sector = u64::from_le_bytes(start);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // A discard may have no flag at all (section 5.2.6.2).
        if flags & !UNMAP != 0 || discard && flags != 0 {
            return Err(Status::Unsupported);
        }
        if count > MAX_RANGE_SECTORS || limits.read_only {
            return Err(Status::IoError);
        }
        let len_bytes = u64::from(count) * SECTOR_BYTES;
        let offset_bytes = inside(sector, len_bytes, limits)?;
        Ok(if discard {
            Operation::Discard { offset_bytes, len_bytes }
        } else {
            Operation::Zero { offset_bytes, len_bytes, unmap: flags & UNMAP != 0 }
        })
    }
}

/// Where a transfer starts, if the disk can make it.
fn transfer(sector: u64, len_bytes: u64, limits: &Limits) -> Result<u64, Status> {
    let offset_bytes = inside(sector, len_bytes, limits)?;
    let aligned = [offset_bytes, len_bytes].iter().all(|it| it.is_multiple_of(limits.block_bytes));
    if aligned && len_bytes <= MAX_TRANSFER_BYTES { Ok(offset_bytes) } else { Err(Status::IoError) }
}

fn inside(sector: u64, len_bytes: u64, limits: &Limits) -> Result<u64, Status> {
    let offset_bytes = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset_bytes.checked_add(len_bytes).ok_or(Status::IoError)?;
    if end <= limits.size_bytes { Ok(offset_bytes) } else { Err(Status::IoError) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;

    const LIMITS: Limits = Limits {
        size_bytes: 8 * 512,
        block_bytes: 512,
        read_only: false,
        can_discard: true,
        can_zero: true,
    };

    fn header(kind: u32, sector: u64) -> Header {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        Header::parse(bytes)
    }

    fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&count.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    #[test]
    fn transfers_inside_the_disk_are_taken() {
        let read = header(VIRTIO_BLK_T_IN, 7).operation(0, 512, &LIMITS);
        assert_eq!(read, Ok(Operation::Read { offset_bytes: 7 * 512, len_bytes: 512 }));
        let write = header(VIRTIO_BLK_T_OUT, 0).operation(8 * 512, 0, &LIMITS);
        assert_eq!(write, Ok(Operation::Write { offset_bytes: 0, len_bytes: 8 * 512 }));
    }

    #[test]
    fn transfers_past_the_end_or_of_half_a_sector_fail() {
        for (sector, len_bytes) in
            [(8, 512), (7, 1024), (0, 511), (u64::MAX, 512), (1 << 55, 512), (u64::MAX / 512, 512)]
        {
            let read = header(VIRTIO_BLK_T_IN, sector).operation(0, len_bytes, &LIMITS);
            assert_eq!(read, Err(Status::IoError), "{sector} {len_bytes}");
        }
    }

    #[test]
    fn a_read_only_disk_takes_no_writes_and_still_reads() {
        let limits = Limits { read_only: true, ..LIMITS };
        let write = header(VIRTIO_BLK_T_OUT, 0).operation(512, 0, &limits);
        assert_eq!(write, Err(Status::IoError));
        assert!(header(VIRTIO_BLK_T_IN, 0).operation(0, 512, &limits).is_ok());
        let zero = header(VIRTIO_BLK_T_WRITE_ZEROES, 0).range_operation(range(0, 1, 0), &limits);
        assert_eq!(zero, Err(Status::IoError));
    }

    #[test]
    fn unaligned_transfers_fail_on_a_disk_of_larger_blocks() {
        let limits = Limits { block_bytes: 4096, ..LIMITS };
        assert!(header(VIRTIO_BLK_T_IN, 1).operation(0, 512, &limits).is_err());
        assert!(header(VIRTIO_BLK_T_IN, 0).operation(0, 4096, &limits).is_ok());
    }

    #[test]
    fn unknown_requests_and_flags_are_unsupported() {
        assert_eq!(header(77, 0).operation(0, 0, &LIMITS), Err(Status::Unsupported));
        let discard = header(VIRTIO_BLK_T_DISCARD, 0);
        assert_eq!(discard.range_operation(range(0, 1, 1), &LIMITS), Err(Status::Unsupported));
        let zero = header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
        assert_eq!(zero.range_operation(range(0, 1, 2), &LIMITS), Err(Status::Unsupported));
    }

    #[test]
    fn ranges_are_checked_like_transfers() {
        let zero = header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
        let whole = Operation::Zero { offset_bytes: 0, len_bytes: 8 * 512, unmap: true };
        assert_eq!(zero.range_operation(range(0, 8, 1), &LIMITS), Ok(whole));
        for bad in [range(0, 9, 0), range(u64::MAX, 1, 0), range(0, u32::MAX, 0)] {
            assert_eq!(zero.range_operation(bad, &LIMITS), Err(Status::IoError), "{bad:?}");
        }
        let without = Limits { can_discard: false, ..LIMITS };
        let discard = header(VIRTIO_BLK_T_DISCARD, 0);
        assert_eq!(discard.range_operation(range(0, 1, 0), &without), Err(Status::Unsupported));
    }

    proptest! {
        #[test]
        fn whatever_is_asked_for_lies_within_the_disk_or_is_refused(
            bytes: [u8; 16],
            range: [u8; 16],
            moved in (any::<u64>(), any::<u64>()),
            size_sectors in 0_u64..1 << 40,
            block_shift in 9_u32..13,
        ) {
            let block_bytes = 1 << block_shift;
            let limits = Limits { size_bytes: size_sectors * SECTOR_BYTES, block_bytes, ..LIMITS };
            let mut near = range;
            // A range that is likely to lie in the disk, too.
            near[5..].fill(0);
            let header = Header::parse(bytes);
            for range in [range, near] {
                check(header.range_operation(range, &limits), &limits);
            }
            check(header.operation(moved.0, moved.1, &limits), &limits);
            for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD] {
                let header = Header { kind, sector: header.sector % (size_sectors + 2) };
                check(header.operation(moved.0 % (1 << 21), moved.1 % (1 << 21), &limits), &limits);
                check(header.range_operation(near, &limits), &limits);
            }
        }
    }

    fn check(operation: Result<Operation, Status>, limits: &Limits) {
        let (Operation::Read { offset_bytes, len_bytes }
        | Operation::Write { offset_bytes, len_bytes }
        | Operation::Discard { offset_bytes, len_bytes }
        | Operation::Zero { offset_bytes, len_bytes, .. }) = (match operation {
            Ok(operation) => operation,
            Err(_) => return,
        })
        else {
            return;
        };
        let end = u128::from(offset_bytes) + u128::from(len_bytes);
        assert!(end <= u128::from(limits.size_bytes), "{operation:?} of {limits:?}");
    }
}
