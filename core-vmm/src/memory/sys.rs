//! Guest RAM as host mappings and KVM slots: what the compiler can't check of it.
#![expect(unsafe_code, reason = "mappings and KVM's slots have no safe interface")]

use std::{
    io,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
    sync::Arc,
};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use libc::c_void;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
    mmap::MmapRegionBuilder,
};

use super::slots::Slot;

/// Addresses of this process that are kept free for RAM to come, so that each piece has one place,
/// aligned as its place in the guest is.
#[derive(Debug)]
pub(super) struct Room {
    start: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the addresses stay reserved for as long as the process lives; what is mapped there is
// owned by the regions.
unsafe impl Send for Room {}

fn to_len(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_error| io::ErrorKind::OutOfMemory.into())
}

/// Makes `len` bytes at `at` inaccessible; at any free place if `at` is null.
fn reserve(at: *mut c_void, len: usize) -> io::Result<NonNull<c_void>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let flags = if at.is_null() { flags } else { flags | libc::MAP_FIXED };
    // SAFETY: without an address the kernel picks one that nothing uses; with one the caller says
    // that nothing uses what is mapped there.
    let start = unsafe { libc::mmap(at, len, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory.into())
}

impl Room {
    /// Keeps `bytes` free at a multiple of `align`, a power of two.
    ///
    /// # Errors
    ///
    /// Fails if this process has no room.
    pub(super) fn reserve(bytes: u64, align: u64) -> io::Result<Self> {
        let (bytes, align) = (to_len(bytes)?, to_len(align)?);
        let all = bytes.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        let start = reserve(ptr::null_mut(), all)?;
        let start = start.map_addr(|address| {
            let aligned = address.get().next_multiple_of(align);
            address.saturating_add(aligned - address.get())
        });
        Ok(Self { start, bytes })
    }

    /// Maps a whole piece of memory `at` so many bytes from the start, for the guest to see at
    /// `guest`. The mapping is left out of core dumps.
    ///
    /// # Errors
    ///
    /// Fails if the host has no room, or the piece is not in this room.
    pub(super) fn map(
        &self,
        at: u64,
        part: FileOffset,
        (guest, bytes): (GuestAddress, u64),
    ) -> io::Result<Mapping> {
        let region = self.region(at, part, bytes)?;
        let region = GuestRegionMmap::new(region, guest).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Mapping { region: Arc::new(region), in_kvm: None })
    }

    fn region(&self, at: u64, part: FileOffset, bytes: u64) -> io::Result<MmapRegion> {
        let (at, len) = (to_len(at)?, to_len(bytes)?);
        let offset = i64::try_from(part.start()).map_err(|_error| io::ErrorKind::InvalidInput)?;
        if at.checked_add(len).is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let place = self.start.as_ptr().map_addr(|address| address + at);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let fd = part.file().as_raw_fd();
        // SAFETY: the place was reserved by `reserve` and nothing but guest memory is ever there;
        // where some is, it is replaced by other memory, of the same guest's.
        let mapped = unsafe { libc::mmap(place, len, prot, flags | libc::MAP_FIXED, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range was mapped just now; the advice changes no content.
        if unsafe { libc::madvise(mapped, len, libc::MADV_DONTDUMP) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `mapped` is a mapping of `len` bytes with these protections. It stays for ever, or
        // until the `Mapping` that owns the one region made of it finds that nobody else has that.
        let builder = unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(mapped.cast()) };
        builder
            .with_file_offset(part)
            .with_mmap_prot(prot)
            .with_mmap_flags(flags)
            .build()
            .map_err(io::Error::other)
    }
}

/// Maps `bytes` of guest memory from its file for as long as the process lives, at a multiple of
/// `align`, which is a power of two and a multiple of the page size. The mapping is left out of core
/// dumps.
///
/// # Errors
///
/// Fails if the host has no room for the mapping.
pub(super) fn map_for_good(part: FileOffset, bytes: u64, align: u64) -> io::Result<MmapRegion> {
    Room::reserve(bytes, align)?.region(0, part, bytes)
}

/// Gives `bytes` of a region to KVM as a slot; a slot of no bytes is one that KVM forgets.
///
/// # Errors
///
/// Fails if KVM refuses it.
pub(super) fn set_slot(
    vm: &VmFd,
    slot: &Slot,
    region: &GuestRegionMmap,
    bytes: u64,
) -> io::Result<()> {
    let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
    let slot = kvm_userspace_memory_region {
        slot: slot.number(),
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: bytes,
        userspace_addr: host.expose_provenance() as u64,
    };
    // SAFETY: the slot is this region's alone. The region is one that was mapped for good, or a
    // `Mapping`'s, which is not taken away before KVM has forgotten the slot: the guest can touch
    // nothing else through it.
    unsafe { vm.set_user_memory_region(slot) }.map_err(Into::into)
}

/// A piece of memory that is mapped, and maybe in KVM. Both end when it is dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    region: Arc<GuestRegionMmap>,
    in_kvm: Option<(Arc<VmFd>, Slot)>,
}

impl Mapping {
    pub(super) fn region(&self) -> &Arc<GuestRegionMmap> {
        &self.region
    }

    /// Lets the guest see it, by this slot.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses it.
    pub(super) fn show(&mut self, vm: &Arc<VmFd>, slot: Slot) -> io::Result<()> {
        set_slot(vm, &slot, &self.region, self.region.len())?;
        self.in_kvm = Some((Arc::clone(vm), slot));
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let start = self.region.start_addr().0;
        if let Some((vm, slot)) = self.in_kvm.take()
            && let Err(error) = set_slot(&vm, &slot, &self.region, 0)
        {
            // The guest may see it still, so it stays, and so does the slot.
            log::error!("KVM does not give up guest memory at {start:#x}: {error}");
            std::mem::forget(slot);
            return;
        }
        // The place is the only one that was ever given out for this memory.
        let Some(region) = Arc::get_mut(&mut self.region) else {
            log::error!("guest memory at {start:#x} is in use and stays mapped");
            return;
        };
        let len = usize::try_from(region.len()).unwrap_or(0);
        let unmapped = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(io::Error::other)
            .and_then(|host| reserve(host.cast(), len));
        if let Err(error) = unmapped {
            log::error!("can't unmap guest memory at {start:#x}: {error}");
        }
    }
}
