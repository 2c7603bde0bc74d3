//! The log of pages that the device has written to, for a frontend that moves a running guest.
//!
//! A bit for each page of the guest's memory, in memory that the frontend gave (vhost-user
//! specification, "Migration"). A page is logged after it was written and before the guest is told,
//! so that whoever copies memory meanwhile copies it once more.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::message::VhostUserLog;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestMemory as _, GuestMemoryRegion as _, MmapRegion, VolatileMemory as _,
};

use crate::ring::{Memory, Segment};

const PAGE_BYTES: u64 = 4096;

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirtyError {
    #[error("cannot examine the log's file")]
    File(#[source] io::Error),
    #[error("the log's file is no memory, or ends before the log")]
    ShortFile,
    #[error("cannot map the log")]
    Map(#[source] MmapRegionError),
}

/// The bits, shared with the frontend.
#[derive(Debug)]
pub(crate) struct Bits(MmapRegion<()>);

/// The log of one ring.
#[derive(Clone, Debug)]
pub(crate) struct DirtyLog {
    pub(crate) bits: Arc<Bits>,
    /// The guest address under which writes to the used ring are logged, if they are to be.
    pub(crate) used_ring: Option<u64>,
}

impl Bits {
    /// Maps the log.
    pub(crate) fn map(given: &VhostUserLog, file: File) -> Result<Self, DirtyError> {
        let (offset, len_bytes) = (given.mmap_offset, given.mmap_size);
        let metadata = file.metadata().map_err(DirtyError::File)?;
        let end = offset.checked_add(len_bytes);
        if !metadata.is_file() || end.is_none_or(|end| end > metadata.len()) {
            return Err(DirtyError::ShortFile);
        }
        let len = usize::try_from(len_bytes).map_err(|_error| DirtyError::ShortFile)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len);
        Ok(Self(mapping.map_err(DirtyError::Map)?))
    }

    /// Logs the pages of a piece of guest memory. What lies behind the log's end is left out: a
    /// frontend that wants to know of it gives a longer log.
    fn mark(&self, start: u64, len_bytes: u64) {
        let Some(last) = len_bytes.checked_sub(1).and_then(|more| start.checked_add(more)) else {
            return;
        };
        for page in start / PAGE_BYTES..=last / PAGE_BYTES {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            let Ok(bits) = self.0.get_atomic_ref::<AtomicU8>(byte) else { return };
            bits.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

impl DirtyLog {
    /// Logs a used ring of so many bytes, if that was asked for.
    pub(crate) fn mark_used_ring(&self, len_bytes: u64) {
        if let Some(start) = self.used_ring {
            self.bits.mark(start, len_bytes);
        }
    }

    /// Logs where a device may have written.
    pub(crate) fn mark(&self, memory: &Memory, segments: &[Segment]) {
        for segment in segments {
            let address = segment.as_ptr() as usize;
            let region = memory.iter().find_map(|region| {
                let offset = address.checked_sub(region.as_ptr() as usize)? as u64;
                (offset < region.len()).then(|| region.start_addr().0 + offset)
            });
            if let Some(start) = region {
                self.bits.mark(start, segment.len() as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn file(bytes: u64) -> File {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn each_page_that_a_piece_touches_is_logged_and_none_behind_the_log() {
        let log = file(4096);
        let given = VhostUserLog { mmap_size: 4096, mmap_offset: 0 };
        let bits = Bits::map(&given, log.try_clone().unwrap()).unwrap();
        bits.mark(4096 * 7 + 4095, 2);
        bits.mark(4096 * 100, 0);
        bits.mark(4096 * (8 * 4096 - 1), 3 * 4096);
        bits.mark(u64::MAX - 5, 5);
        bits.mark(u64::MAX - 5, 50);
        let mut found = vec![0; 4096];
        log.read_exact_at(&mut found, 0).unwrap();
        assert_eq!((found[0], found[1], found[4095]), (1 << 7, 1, 1 << 7));
        assert_eq!(found.iter().filter(|byte| **byte != 0).count(), 3);
    }

    #[test]
    fn a_log_longer_than_its_file_is_refused() {
        for (mmap_size, mmap_offset) in [(4097, 0), (4096, 4096), (u64::MAX, 1)] {
            let given = VhostUserLog { mmap_size, mmap_offset };
            assert!(matches!(Bits::map(&given, file(4096)), Err(DirtyError::ShortFile)));
        }
    }
}
