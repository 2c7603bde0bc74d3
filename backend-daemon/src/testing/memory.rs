//! The guest's memory: sealed memfds, rings in a low region, buffers in others far above.

use std::collections::BTreeMap;
use std::fs::File;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use super::Options;

/// A region that was added later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region(pub(super) u64);

/// What one queue's rings may take.
pub(super) const QUEUE_STRIDE: u64 = 1 << 16;
const FIRST_BUFFERS: u64 = 1 << 32;
/// Buffers never share a page, so that a device that writes too far is found out.
const PAGE: u64 = 4096;

pub(super) struct GuestMemory {
    map: GuestMemoryMmap<()>,
    /// Free ranges: start and length.
    free: BTreeMap<u64, u64>,
    misaligned_bytes: u64,
    next_region: u64,
}

impl GuestMemory {
    pub(super) fn new(options: &Options) -> Self {
        // Queue areas start at one stride, so that no ring has address 0.
        let low = QUEUE_STRIDE * (u64::from(options.queues) + 1);
        let mut memory = Self {
            map: GuestMemoryMmap::from_regions(vec![region(0, low)]).unwrap(),
            free: BTreeMap::new(),
            misaligned_bytes: options.misaligned_bytes,
            next_region: FIRST_BUFFERS,
        };
        memory.grow(options.memory_bytes);
        memory
    }

    pub(super) fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    /// Adds a region of buffers, from which they come first.
    pub(super) fn grow(&mut self, bytes: u64) -> Region {
        let start = self.next_region;
        self.next_region += 1 << 32;
        self.map = self.map.insert_region(region(start, bytes).into()).unwrap();
        self.free.insert(start, bytes);
        Region(start)
    }

    /// Takes a region away; its buffers must not be in use.
    pub(super) fn shrink(&mut self, Region(start): Region) {
        let len = self.free.remove(&start).expect("the region was added, and is free");
        let (map, _removed) = self.map.remove_region(GuestAddress(start), len).unwrap();
        self.map = map;
    }

    /// A buffer's address. The newest region is taken first.
    pub(super) fn allocate(&mut self, len_bytes: u64) -> u64 {
        let needed = span(self.misaligned_bytes + len_bytes);
        let (start, len) = self
            .free
            .iter()
            .rev()
            .find(|(_start, len)| **len >= needed)
            .map(|(start, len)| (*start, *len))
            .expect("the guest has memory left");
        self.free.remove(&start);
        if len > needed {
            self.free.insert(start + needed, len - needed);
        }
        start + self.misaligned_bytes
    }

    pub(super) fn release(&mut self, address: u64, len_bytes: u64) {
        let mut start = address - self.misaligned_bytes;
        let mut len = span(self.misaligned_bytes + len_bytes);
        if let Some(next_len) = self.free.remove(&(start + len)) {
            len += next_len;
        }
        let before = self.free.range(..start).next_back().map(|(start, len)| (*start, *len));
        if let Some((before, before_len)) = before
            && before + before_len == start
        {
            self.free.remove(&before);
            (start, len) = (before, before_len + len);
        }
        self.free.insert(start, len);
    }

    pub(super) fn write<T: ByteValued>(&self, address: u64, value: T) {
        self.map.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(super) fn read<T: ByteValued>(&self, address: u64) -> T {
        self.map.read_obj(GuestAddress(address)).unwrap()
    }

    pub(super) fn write_bytes(&self, address: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn read_bytes(&self, address: u64, len_bytes: u32) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes as usize];
        self.map.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Each page by its number.
    pub(super) fn pages(&self) -> BTreeMap<u64, Vec<u8>> {
        let starts = self.map.iter().flat_map(|region| {
            let start = region.start_addr().0;
            (start..start + region.len()).step_by(4096)
        });
        starts.map(|start| (start / PAGE, self.read_bytes(start, 4096))).collect()
    }

    /// A number of pages that all of the memory is below.
    pub(super) fn page_count(&self) -> u64 {
        self.next_region / PAGE
    }

    /// The address by which the frontend speaks of a guest address.
    pub(super) fn user_address(&self, guest: u64) -> u64 {
        self.map.get_host_address(GuestAddress(guest)).unwrap() as u64
    }

    pub(super) fn region(&self, Region(start): Region) -> &GuestRegionMmap<()> {
        self.map.iter().find(|region| region.start_addr().0 == start).unwrap()
    }
}

/// How much a buffer of so many bytes takes: whole pages, and at least one.
fn span(len_bytes: u64) -> u64 {
    len_bytes.max(1).next_multiple_of(PAGE)
}

fn region(start: u64, bytes: u64) -> GuestRegionMmap<()> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("guest", flags).unwrap());
    file.set_len(bytes).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    let len = usize::try_from(bytes).unwrap();
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), len).unwrap();
    GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
}
