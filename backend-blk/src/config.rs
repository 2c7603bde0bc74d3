//! The configuration space of a block device: what a driver reads of the disk.

use crate::request::{Limits, MAX_RANGE_SECTORS, SECTOR_BYTES};

/// What the host's file systems and page cache work in: larger guest I/O is cheaper.
const PHYSICAL_BLOCK_BYTES: u64 = 4096;

/// `struct virtio_blk_config` (virtio 1.3, section 5.2.4).
pub(crate) fn bytes(limits: &Limits, queues: u16, seg_max: u32) -> Vec<u8> {
    let block_bytes = u32::try_from(limits.block_bytes).unwrap_or(u32::MAX);
    let physical_exponent = (PHYSICAL_BLOCK_BYTES / limits.block_bytes).max(1).ilog2();
    let (discard, zero) = (u32::from(limits.can_discard), u32::from(limits.can_zero));
    let mut config = Vec::with_capacity(60);
    config.extend((limits.size_bytes / SECTOR_BYTES).to_le_bytes());
    config.extend(0_u32.to_le_bytes()); // size_max: not offered
    config.extend(seg_max.to_le_bytes());
    config.extend([0; 4]); // geometry: not offered
    config.extend(block_bytes.to_le_bytes());
    config.extend([u8::try_from(physical_exponent).unwrap_or(0), 0]); // no offset
    config.extend(1_u16.to_le_bytes()); // min_io_size, in logical blocks
    config.extend(0_u32.to_le_bytes()); // opt_io_size: none
    config.extend([0, 0]); // writeback: not offered; unused
    config.extend(queues.to_le_bytes());
    for (max_sectors, segments) in
        [(discard * MAX_RANGE_SECTORS, discard), (zero * MAX_RANGE_SECTORS, zero)]
    {
        config.extend(max_sectors.to_le_bytes());
        config.extend(segments.to_le_bytes());
        if config.len() == 44 {
            // discard_sector_alignment
            config.extend((block_bytes / 512).to_le_bytes());
        }
    }
    config.extend([u8::from(limits.can_zero), 0, 0, 0]); // write_zeroes_may_unmap
    config
}
