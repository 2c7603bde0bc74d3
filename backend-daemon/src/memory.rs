//! The guest's memory as the frontend describes it: regions, each a piece of a file.
//!
//! Every region is checked before it is mapped; a table that does not hold together changes
//! nothing. The frontend speaks of a ring by its own (user) addresses, so the table translates.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion,
};

use crate::ring::Memory;

/// The most regions at a time: what the kernel's own vhost takes by default.
pub(crate) const MAX_REGIONS: usize = 509;

/// What can be wrong with a memory table.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("{count} memory regions are more than {MAX_REGIONS}")]
    TooMany { count: usize },
    #[error("a memory region of {size_bytes} bytes at {guest:#x} is empty or wraps around")]
    Range { guest: u64, size_bytes: u64 },
    #[error("two memory regions share the user address {user:#x}")]
    UserOverlap { user: u64 },
    #[error("the memory regions overlap")]
    GuestOverlap(#[from] GuestRegionCollectionError),
    #[error("cannot examine the file of the memory region at {guest:#x}")]
    File { guest: u64, source: io::Error },
    #[error("the file of the memory region at {guest:#x} is not memory, or ends before it")]
    ShortFile { guest: u64 },
    #[error("cannot map the memory region at {guest:#x}")]
    Map { guest: u64, source: MmapRegionError },
    #[error("no memory region of {size_bytes} bytes at {guest:#x}")]
    Unknown { guest: u64, size_bytes: u64 },
}

#[derive(Clone)]
struct Entry {
    user: u64,
    region: Arc<GuestRegionMmap<()>>,
}

/// The regions, sorted by guest address.
#[derive(Clone, Default)]
pub(crate) struct Table {
    entries: Vec<Entry>,
}

impl Table {
    /// A table of exactly these regions, each with its file.
    pub(crate) fn of(
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<Self, MemoryError> {
        let mut table = Self::default();
        for (region, file) in regions.iter().zip(files) {
            table.add(region, file)?;
        }
        Ok(table)
    }

    /// Adds a region.
    pub(crate) fn add(
        &mut self,
        region: &VhostUserMemoryRegion,
        file: File,
    ) -> Result<(), MemoryError> {
        let (guest, user, size_bytes) =
            (region.guest_phys_addr, region.user_addr, region.memory_size);
        let count = self.entries.len() + 1;
        if count > MAX_REGIONS {
            return Err(MemoryError::TooMany { count });
        }
        let size = usize::try_from(size_bytes)
            .ok()
            .filter(|size| *size > 0 && user.checked_add(size_bytes).is_some())
            .ok_or(MemoryError::Range { guest, size_bytes })?;
        if self
            .entries
            .iter()
            .any(|entry| user < entry.user + entry.region.len() && entry.user < user + size_bytes)
        {
            return Err(MemoryError::UserOverlap { user });
        }
        let mapping = map(region, size, file)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest))
            .ok_or(MemoryError::Range { guest, size_bytes })?;
        let mut entries = self.entries.clone();
        entries.push(Entry { user, region: Arc::new(region) });
        entries.sort_by_key(|entry| entry.region.start_addr());
        let table = Self { entries };
        table.memory()?;
        *self = table;
        Ok(())
    }

    /// Removes a region; `region` has to match what was added, but for the file.
    pub(crate) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), MemoryError> {
        let (guest, user, size_bytes) =
            (region.guest_phys_addr, region.user_addr, region.memory_size);
        let position = self.entries.iter().position(|entry| {
            entry.region.start_addr() == GuestAddress(guest)
                && entry.region.len() == size_bytes
                && entry.user == user
        });
        let position = position.ok_or(MemoryError::Unknown { guest, size_bytes })?;
        self.entries.remove(position);
        Ok(())
    }

    /// The guest address behind one of the frontend's own.
    pub(crate) fn translate(&self, user: u64) -> Option<GuestAddress> {
        self.entries.iter().find_map(|entry| {
            let offset = user.checked_sub(entry.user)?;
            (offset < entry.region.len())
                .then(|| GuestAddress(entry.region.start_addr().0 + offset))
        })
    }

    /// The memory that the table describes; the mappings are shared with it.
    pub(crate) fn memory(&self) -> Result<Memory, MemoryError> {
        if self.entries.is_empty() {
            return Ok(Memory::new());
        }
        let regions = self.entries.iter().map(|entry| Arc::clone(&entry.region)).collect();
        Ok(Memory::from_arc_regions(regions)?)
    }
}

/// Maps a region. The file has to be as long as the region says: touching a page behind its end
/// would raise a signal. A frontend that shortens it later only ends its own device, and one
/// that seals its memory can't.
fn map(
    region: &VhostUserMemoryRegion,
    size: usize,
    file: File,
) -> Result<MmapRegion<()>, MemoryError> {
    let (guest, offset) = (region.guest_phys_addr, region.mmap_offset);
    let metadata = file.metadata().map_err(|source| MemoryError::File { guest, source })?;
    let end = offset.checked_add(size as u64);
    if !metadata.is_file() || end.is_none_or(|end| end > metadata.len()) {
        return Err(MemoryError::ShortFile { guest });
    }
    MmapRegion::from_file(FileOffset::new(file, offset), size)
        .map_err(|source| MemoryError::Map { guest, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn file(pages: u64) -> File {
        let fd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(pages * PAGE).unwrap();
        file
    }

    fn region(guest: u64, pages: u64, user: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, pages * PAGE, user, 0)
    }

    #[test]
    fn user_addresses_are_translated_and_those_between_regions_are_not() {
        let regions = [region(1 << 32, 2, 0x7000_0000), region(0, 1, 0x5000_0000)];
        let table = Table::of(&regions, vec![file(2), file(1)]).unwrap();
        assert_eq!(table.translate(0x5000_0010), Some(GuestAddress(0x10)));
        assert_eq!(table.translate(0x7000_1fff), Some(GuestAddress((1 << 32) + 0x1fff)));
        assert_eq!(table.translate(0x7000_2000), None);
        assert_eq!(table.translate(0x4fff_ffff), None);
    }

    #[test]
    fn a_region_that_overlaps_another_is_refused_and_the_table_stays() {
        let mut table = Table::of(&[region(0, 2, 0x5000_0000)], vec![file(2)]).unwrap();
        let same_guest = table.add(&region(PAGE, 1, 0x6000_0000), file(1));
        assert!(matches!(same_guest, Err(MemoryError::GuestOverlap(_))));
        let same_user = table.add(&region(1 << 32, 1, 0x5000_1000), file(1));
        assert!(matches!(same_user, Err(MemoryError::UserOverlap { .. })));
        assert_eq!(table.translate(0x5000_1000), Some(GuestAddress(PAGE)));
    }

    #[test]
    fn a_region_longer_than_its_file_is_refused() {
        let result = Table::of(&[region(0, 2, 0x5000_0000)], vec![file(1)]);
        assert!(matches!(result, Err(MemoryError::ShortFile { guest: 0 })));
    }

    #[test]
    fn ranges_that_are_empty_or_wrap_around_are_refused() {
        let mut table = Table::default();
        for bad in [region(0, 0, 0), region(0, 1, u64::MAX - 10), region(u64::MAX - 10, 1, 0)] {
            let guest = bad.guest_phys_addr;
            let result = table.add(&bad, file(1));
            assert!(matches!(result, Err(MemoryError::Range { .. })), "{guest:#x}");
        }
    }

    #[test]
    fn only_a_region_that_was_added_can_be_removed() {
        let mut table = Table::of(&[region(0, 1, 0x5000_0000)], vec![file(1)]).unwrap();
        assert!(table.remove(&region(0, 1, 0x5000_1000)).is_err());
        table.remove(&region(0, 1, 0x5000_0000)).unwrap();
        assert_eq!(table.translate(0x5000_0000), None);
        assert!(table.memory().is_ok());
    }
}
