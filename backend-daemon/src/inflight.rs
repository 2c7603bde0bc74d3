//! The region in which requests in flight are marked, so that a successor can take them up.
//!
//! The frontend keeps the region's file while backends come and go. Its layout is the vhost-user
//! specification's for split rings ("Inflight I/O tracking"), in the host's byte order: for each
//! queue a header and one entry a descriptor, the queues' parts aligned to 64 bytes. The `vhost`
//! crate's structures have another layout and are not used. Whatever stands in the region is
//! checked before it is used as an index; it can cost a guest its requests, and nothing else.

mod log;

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

#[cfg(test)]
pub(crate) use self::log::fault;
pub(crate) use self::log::{Log, Step, reach};

/// A queue's part starts at a multiple of this.
const ALIGN_BYTES: usize = 64;
/// `features`, `version`, `desc_num`, `last_batch_head`, `used_idx`.
const HEADER_BYTES: usize = 16;
/// `inflight`, padding, `next`, `counter`.
const ENTRY_BYTES: usize = 16;
/// The most descriptors of a split ring (virtio 1.3, section 2.7).
const MAX_SIZE: u16 = 1 << 15;

/// Why a region can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    #[error("a region for {queues} queues of {size} descriptors: the device has {most} queues")]
    Shape { queues: u16, size: u16, most: u16 },
    #[error("cannot make the region")]
    Make(#[source] io::Error),
    #[error("{len_bytes} bytes are too few for {queues} queues of {size} descriptors")]
    Short { len_bytes: u64, queues: u16, size: u16 },
    #[error("cannot examine the region's file")]
    File(#[source] io::Error),
    #[error("the region's file is no memory, or ends before the region")]
    ShortFile,
    #[error("cannot map the region")]
    Map(#[source] MmapRegionError),
    #[error("queue {queue}'s part has version {version}, and this program knows version 1")]
    Version { queue: u16, version: u16 },
    #[error("queue {queue}'s part has features {features:#x} or {count} entries, not {size}")]
    Header { queue: u16, features: u64, count: u16, size: u16 },
    #[error("queue {queue} has {size} descriptors, and its part of the region {entries} entries")]
    Entries { queue: u16, size: u16, entries: u16 },
}

/// A mapped region.
#[derive(Debug)]
pub(crate) struct Region {
    mapping: Arc<MmapRegion<()>>,
    queues: u16,
    /// Entries of each queue.
    size: u16,
}

/// The size of one queue's part, in bytes.
fn part_bytes(size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(size)).next_multiple_of(ALIGN_BYTES)
}

fn check_shape(asked: &VhostUserInflight, most: u16) -> Result<u64, InflightError> {
    let (queues, size) = (asked.num_queues, asked.queue_size);
    if queues == 0 || queues > most || size == 0 || size > MAX_SIZE {
        return Err(InflightError::Shape { queues, size, most });
    }
    Ok(usize::from(queues) as u64 * part_bytes(size) as u64)
}

/// Makes the file of an empty region for a device of `most` queues of at most `max_size`
/// descriptors.
///
/// A part has `max_size` entries even if fewer are asked for, and says so in its header: QEMU asks
/// for its own default size, and a guest's driver may take a larger ring.
///
/// # Errors
///
/// Fails if the device has no such queues, or the host no memory.
pub(crate) fn make(
    asked: &VhostUserInflight,
    most: u16,
    max_size: u16,
) -> Result<(VhostUserInflight, File), InflightError> {
    check_shape(asked, most)?;
    let size = asked.queue_size.max(max_size);
    let made = VhostUserInflight::new(0, 0, asked.num_queues, size);
    let len_bytes = check_shape(&made, most)?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("inflight", flags).map(File::from);
    let file = file.map_err(|error| InflightError::Make(error.into()))?;
    file.set_len(len_bytes).map_err(InflightError::Make)?;
    let length = usize::try_from(len_bytes).unwrap_or(usize::MAX);
    let copy = file.try_clone().map_err(InflightError::Make)?;
    let mapping =
        MmapRegion::from_file(FileOffset::new(copy, 0), length).map_err(InflightError::Map)?;
    let region = Region { mapping: Arc::new(mapping), queues: asked.num_queues, size };
    for queue in 0..asked.num_queues {
        region.part(queue).declare();
    }
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(|error| InflightError::Make(error.into()))?;
    Ok((VhostUserInflight::new(len_bytes, 0, asked.num_queues, size), file))
}

impl Region {
    /// Maps the region that the frontend kept, for a device of `most` queues.
    ///
    /// # Errors
    ///
    /// Fails if the region is not what `given` says, or of a version that is not known here.
    pub(crate) fn adopt(
        given: &VhostUserInflight,
        file: File,
        most: u16,
    ) -> Result<Self, InflightError> {
        let needed = check_shape(given, most)?;
        let (queues, size) = (given.num_queues, given.queue_size);
        let (offset, len_bytes) = (given.mmap_offset, given.mmap_size);
        let len = usize::try_from(len_bytes).ok().filter(|_len| len_bytes >= needed);
        let len = len.ok_or(InflightError::Short { len_bytes, queues, size })?;
        let metadata = file.metadata().map_err(InflightError::File)?;
        let end = offset.checked_add(len_bytes);
        if !metadata.is_file() || end.is_none_or(|end| end > metadata.len()) {
            return Err(InflightError::ShortFile);
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len)
            .map_err(InflightError::Map)?;
        let mut region = Self { mapping: Arc::new(mapping), queues, size };
        // The frontend may not know how many entries the region was made with.
        let entries = region.part(0).entries();
        if (1..=MAX_SIZE).contains(&entries) && usize::from(queues) * part_bytes(entries) <= len {
            region.size = entries;
        }
        for queue in 0..queues {
            region.part(queue).check(queue)?;
        }
        Ok(region)
    }

    /// The part of `queue`, whose ring has `size` descriptors; nothing if the frontend wants the
    /// queue not tracked.
    ///
    /// # Errors
    ///
    /// Fails if the part is too small or can't be read.
    pub(crate) fn log(&self, queue: u16, size: u16) -> Result<Option<Log>, InflightError> {
        if queue >= self.queues {
            return Ok(None);
        }
        if size > self.size {
            return Err(InflightError::Entries { queue, size, entries: self.size });
        }
        let log = self.part(queue);
        log.check(queue)?;
        Ok(Some(log))
    }

    /// Makes the part of `queue` as good as new: its ring was given up in peace.
    pub(crate) fn wipe(&self, queue: u16) {
        if queue < self.queues {
            self.part(queue).wipe();
        }
    }

    fn part(&self, queue: u16) -> Log {
        let start = usize::from(queue) * part_bytes(self.size);
        Log::new(Arc::clone(&self.mapping), start, self.size)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn asked(queues: u16, size: u16) -> VhostUserInflight {
        VhostUserInflight::new(0, 0, queues, size)
    }

    #[test]
    fn a_new_region_is_sealed_empty_and_has_the_specification_s_size() {
        let (info, file) = make(&asked(2, 128), 4, 64).unwrap();
        assert_eq!({ info.mmap_size }, 2 * (16 + 128 * 16_u64).next_multiple_of(64));
        assert_eq!((info.mmap_offset, info.num_queues, info.queue_size), (0, 2, 128));
        assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
        let mut bytes = vec![1; usize::try_from(info.mmap_size).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes[10..12], 128_u16.to_ne_bytes());
        assert!(bytes[12..128].iter().all(|byte| *byte == 0));
        let region = Region::adopt(&info, file, 4).unwrap();
        assert!(region.log(1, 128).unwrap().is_some());
        assert!(region.log(2, 128).unwrap().is_none());
        assert!(matches!(region.log(0, 256), Err(InflightError::Entries { .. })));
    }

    #[test]
    fn a_region_holds_the_largest_ring_even_if_the_frontend_knows_of_a_smaller_one() {
        let (info, file) = make(&asked(2, 128), 2, 1024).unwrap();
        let as_the_frontend_thinks = VhostUserInflight::new(info.mmap_size, 0, 2, 128);
        let region = Region::adopt(&as_the_frontend_thinks, file, 2).unwrap();
        assert!(region.log(1, 1024).unwrap().is_some());
    }

    #[test]
    fn shapes_that_no_device_has_are_refused() {
        for (queues, size) in [(0, 1), (5, 128), (1, 0), (1, MAX_SIZE + 1)] {
            let made = make(&asked(queues, size), 4, 1);
            assert!(matches!(made, Err(InflightError::Shape { .. })), "{queues} {size}");
        }
    }

    #[test]
    fn a_region_that_is_not_what_it_is_said_to_be_is_refused() {
        let (info, file) = make(&asked(2, 64), 2, 1).unwrap();
        let adopt = |mmap_size, mmap_offset, queues, size| {
            let given = VhostUserInflight::new(mmap_size, mmap_offset, queues, size);
            Region::adopt(&given, file.try_clone().unwrap(), 2).map(|_region| ())
        };
        let whole = info.mmap_size;
        adopt(whole, 0, 2, 64).unwrap();
        assert!(matches!(adopt(whole - 1, 0, 2, 64), Err(InflightError::Short { .. })));
        assert!(matches!(adopt(whole, 0, 2, 68), Err(InflightError::Short { .. })));
        assert!(matches!(adopt(whole, 0, 3, 64), Err(InflightError::Shape { .. })));
        assert!(matches!(adopt(whole + 1, 0, 2, 64), Err(InflightError::ShortFile)));
        assert!(matches!(adopt(whole, u64::MAX, 2, 64), Err(InflightError::ShortFile)));
        assert!(matches!(adopt(u64::MAX, 4096, 2, 64), Err(InflightError::ShortFile)));
        assert!(matches!(adopt(whole / 2, 64, 1, 64), Err(InflightError::Map(_))));
    }

    #[test]
    fn a_header_of_another_version_or_shape_is_refused() {
        let (info, file) = make(&asked(1, 64), 1, 1).unwrap();
        let adopt = || Region::adopt(&info, file.try_clone().unwrap(), 1).map(|_region| ());
        file.write_all_at(&2_u16.to_ne_bytes(), 8).unwrap();
        assert!(matches!(adopt(), Err(InflightError::Version { version: 2, .. })));
        file.write_all_at(&1_u16.to_ne_bytes(), 8).unwrap();
        file.write_all_at(&0_u16.to_ne_bytes(), 10).unwrap();
        assert!(matches!(adopt(), Err(InflightError::Header { count: 0, .. })));
        file.write_all_at(&64_u16.to_ne_bytes(), 10).unwrap();
        adopt().unwrap();
        file.write_all_at(&[1], 0).unwrap();
        assert!(matches!(adopt(), Err(InflightError::Header { .. })));
    }
}
