//! Guest RAM as one sealed memory file, mapped once and given to KVM as one or two slots.
//!
//! The file is sealed against shrinking and growing: every backend holds its descriptor, and one
//! `ftruncate` from there would kill whoever touches the mapping. It is mapped at a multiple of
//! 2 MiB, as a mapping that is not costs the host a page-table entry and a fault for each 4 KiB
//! even where the memory itself is large pages. Nothing is touched ahead of the guest.

use std::{fs::File, io, sync::Arc};

use kvm_ioctls::VmFd;
use rustix::{
    fs::{
        FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
    },
    io::Errno,
    system::sysinfo,
};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::{
    layout::{RAM_ALIGN_BYTES, Ram, max_ram_bytes},
    slots::{NoSlot, Slot, Slots},
    sys,
};

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No memory at all.
    #[error("a guest needs memory: --memory is 0")]
    Zero,
    /// Not a multiple of 2 MiB.
    #[error("{option} of {bytes} bytes is no multiple of 2 MiB")]
    Unaligned {
        /// What was asked for.
        option: &'static str,
        /// As asked.
        bytes: u64,
    },
    /// More than the host could ever back.
    #[error(
        "{option} of {bytes} bytes is more than the host's memory and swap of {host_bytes} bytes"
    )]
    BeyondHost {
        /// What was asked for.
        option: &'static str,
        /// As asked.
        bytes: u64,
        /// As the host has.
        host_bytes: u64,
    },
    /// More than the guest can address.
    #[error(
        "{option} of {bytes} bytes is more than the {max_bytes} bytes that a guest with {address_bits} address bits can have"
    )]
    BeyondWidth {
        /// What was asked for.
        option: &'static str,
        /// As asked.
        bytes: u64,
        /// The most.
        max_bytes: u64,
        /// The guest's physical address width.
        address_bits: u32,
    },
    /// The memory file could not be made.
    #[error("can't {action} the guest's memory file of {bytes} bytes")]
    File {
        /// What failed.
        action: &'static str,
        /// The file's size.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// The host's mapping of it can't be described.
    #[error("the mapping of guest memory at {0:#x} is unusable")]
    Region(u64),
    /// KVM has no slot left.
    #[error(transparent)]
    NoSlot(#[from] NoSlot),
    /// KVM refused a slot.
    #[error("KVM refuses guest memory of {bytes} bytes at {start:#x}")]
    Slot {
        /// Guest address.
        start: u64,
        /// Size.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
}

/// The RAM of one VM.
#[derive(Debug)]
pub struct GuestRam {
    /// What RAM there is, and where.
    pub ram: Ram,
    /// The same for reading and writing it; each region knows its part of the memory file.
    pub memory: GuestMemoryMmap,
    file: Arc<File>,
    /// KVM's, once it has the memory.
    slots: Vec<Slot>,
}

/// Checks the size that `option` of the command line gives against what this host and a guest with
/// `address_bits` can have.
///
/// # Errors
///
/// Fails with the limit that the size breaks.
pub fn check_size(option: &'static str, bytes: u64, address_bits: u32) -> Result<(), MemoryError> {
    let info = sysinfo();
    let host_bytes = u64::from(info.mem_unit).saturating_mul(info.totalram + info.totalswap);
    check_size_against(option, bytes, (host_bytes, address_bits))
}

fn check_size_against(
    option: &'static str,
    bytes: u64,
    (host_bytes, address_bits): (u64, u32),
) -> Result<(), MemoryError> {
    let max_bytes = max_ram_bytes(address_bits);
    if bytes == 0 {
        Err(MemoryError::Zero)
    } else if !bytes.is_multiple_of(RAM_ALIGN_BYTES) {
        Err(MemoryError::Unaligned { option, bytes })
    } else if bytes > max_bytes {
        Err(MemoryError::BeyondWidth { option, bytes, max_bytes, address_bits })
    } else if bytes > host_bytes {
        Err(MemoryError::BeyondHost { option, bytes, host_bytes })
    } else {
        Ok(())
    }
}

impl GuestRam {
    /// Makes and maps `bytes` of memory, which [`check_size`] found fine.
    ///
    /// # Errors
    ///
    /// Fails if the host can't make, size, seal or map the file.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        let failed = |action| move |source| MemoryError::File { action, bytes, source };
        let file = Arc::new(memory_file(bytes).map_err(failed("make"))?);
        let ram = Ram::of(bytes);
        let mut regions = Vec::new();
        let mut offset = 0;
        for range in ram.ranges() {
            let len = range.end - range.start;
            let part = FileOffset::from_arc(Arc::clone(&file), offset);
            let region = sys::map_for_good(part, len, RAM_ALIGN_BYTES).map_err(failed("map"))?;
            let region = GuestRegionMmap::new(region, GuestAddress(range.start))
                .ok_or(MemoryError::Region(range.start))?;
            regions.push(region);
            offset += len;
        }
        let memory =
            GuestMemoryMmap::from_regions(regions).map_err(|_error| MemoryError::Region(0))?;
        Ok(Self { ram, memory, file, slots: Vec::new() })
    }

    /// Gives each region to KVM as a slot.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses one.
    pub fn register(&mut self, vm: &VmFd, slots: &Slots) -> Result<(), MemoryError> {
        for region in self.memory.iter() {
            let slot = slots.take()?;
            let (start, bytes) = (region.start_addr().0, region.len());
            sys::set_slot(vm, &slot, region, bytes).map_err(|source| MemoryError::Slot {
                start,
                bytes,
                source,
            })?;
            self.slots.push(slot);
        }
        Ok(())
    }

    /// Adds memory that was plugged.
    ///
    /// # Errors
    ///
    /// Fails if it is where other memory is.
    pub fn add(&mut self, region: &Arc<GuestRegionMmap>) -> Result<(), MemoryError> {
        let start = region.start_addr().0;
        let more = self.memory.insert_region(Arc::clone(region));
        self.memory = more.map_err(|_error| MemoryError::Region(start))?;
        Ok(())
    }

    /// Takes memory away that was added.
    pub fn remove(&mut self, region: &GuestRegionMmap) {
        if let Ok((rest, _region)) = self.memory.remove_region(region.start_addr(), region.len()) {
            self.memory = rest;
        }
    }

    /// Makes all that was not added zero again and gives the host's pages back, for a reset.
    ///
    /// # Errors
    ///
    /// Fails if the host can't punch a hole into the memory file.
    pub fn wipe(&self) -> Result<(), MemoryError> {
        clear(&self.file, self.ram.ranges().map(|range| range.end - range.start).sum())
    }
}

/// Makes a memory file's first `bytes` zero and gives the host's pages back.
pub(super) fn clear(file: &File, bytes: u64) -> Result<(), MemoryError> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, hole, 0, bytes).map_err(|error| MemoryError::File {
        action: "clear",
        bytes,
        source: error.into(),
    })
}

/// A memory file of `bytes` that nobody can resize.
pub(super) fn memory_file(bytes: u64) -> io::Result<File> {
    let fd = memfd_create(
        "nacre-guest-memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL,
    )
    .or_else(|error| match error {
        // Kernels before 6.3 don't know NOEXEC_SEAL.
        Errno::INVAL => {
            memfd_create("nacre-guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        }
        other => Err(other),
    })?;
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory};

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes_that_make_no_sense_are_refused_with_their_limit() {
        let check = |bytes| check_size_against("--memory", bytes, (16 * GIB, 36));
        assert!(matches!(check(0), Err(MemoryError::Zero)));
        assert!(matches!(check(MIB), Err(MemoryError::Unaligned { bytes: MIB, .. })));
        assert!(matches!(check(17 * GIB), Err(MemoryError::BeyondHost { .. })));
        assert!(matches!(check(60 * GIB), Err(MemoryError::BeyondWidth { .. })));
        assert!(check(16 * GIB).is_ok());
        assert!(check(2 * MIB).is_ok());
    }

    #[test]
    fn memory_is_aligned_sealed_and_known_by_file() {
        let ram = GuestRam::new(4 * MIB).unwrap();
        let region = ram.memory.iter().next().unwrap();
        let address = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap();
        assert_eq!(address.addr() as u64 % RAM_ALIGN_BYTES, 0);
        assert_eq!(region.file_offset().unwrap().start(), 0);
        let file = region.file_offset().unwrap().file();
        assert_eq!(file.set_len(0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(file.set_len(8 * MIB).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn regions_around_the_hole_follow_each_other_in_the_file() {
        let ram = GuestRam::new(4 * GIB).unwrap();
        let starts: Vec<_> = ram
            .memory
            .iter()
            .map(|region| (region.start_addr().0, region.file_offset().unwrap().start()))
            .collect();
        assert_eq!(starts, [(0, 0), (4 * GIB, 3 * GIB)]);
        ram.memory.write_obj(7_u64, GuestAddress(5 * GIB - 8)).unwrap();
        assert!(ram.memory.write_obj(7_u64, GuestAddress(3 * GIB)).is_err());
    }

    #[test]
    fn wiped_memory_is_zero() {
        let ram = GuestRam::new(2 * MIB).unwrap();
        ram.memory.write_obj(7_u64, GuestAddress(0x1000)).unwrap();
        ram.wipe().unwrap();
        assert_eq!(ram.memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
    }
}
