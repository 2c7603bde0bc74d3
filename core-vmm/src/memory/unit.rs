//! One unit of RAM that was plugged: a sealed memory file of its own, its mapping, its KVM slot.
//!
//! Each has a file of its own, and no two units that come to the same place in the guest share one.
//! So a backend is given no more memory than the guest has, and one that does not let go of what
//! was taken away (because it was taken over, or because the kernel still reads a disk into it)
//! writes to memory that is nobody's any more: what is plugged next is zero.

use std::{fs::File, sync::Arc};

use kvm_ioctls::VmFd;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::{
    hotplug::Plan,
    region::{MemoryError, clear, memory_file},
    slots::Slots,
    sys::{Mapping, Room},
};

/// Where units are made: their places in this process and in KVM.
#[derive(Debug)]
pub struct Site {
    plan: Plan,
    room: Room,
    vm: Arc<VmFd>,
    slots: Slots,
}

/// A unit that is there. Dropped, it is gone: from KVM, from this process, and its pages are the
/// host's again, whoever else has the file.
#[derive(Debug)]
pub struct Unit {
    number: u32,
    /// Dropped before the file's pages are given back.
    mapping: Mapping,
    pages: Pages,
}

/// A memory file whose pages go back to the host when this is dropped.
#[derive(Debug)]
struct Pages {
    file: Arc<File>,
    bytes: u64,
}

impl Site {
    /// A site for all units of `plan`.
    ///
    /// # Errors
    ///
    /// Fails if this process has no room for their addresses.
    pub fn new(plan: Plan, vm: Arc<VmFd>, slots: Slots) -> Result<Self, MemoryError> {
        let bytes = plan.max_bytes() - plan.boot_bytes();
        let failed = |source| MemoryError::File { action: "keep room to map", bytes, source };
        let room = Room::reserve(bytes, plan.unit_bytes()).map_err(failed)?;
        Ok(Self { plan, room, vm, slots })
    }

    /// Which units there can be, and where.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Makes a unit, all zero, and gives it to KVM.
    ///
    /// # Errors
    ///
    /// Fails if the host can't make or map its memory, or KVM refuses it.
    pub fn make(&self, number: u32) -> Result<Unit, MemoryError> {
        let bytes = self.plan.unit_bytes();
        let start = self.plan.range(number).start;
        let failed = |action| move |source| MemoryError::File { action, bytes, source };
        let slot = self.slots.take()?;
        let file = Arc::new(memory_file(bytes).map_err(failed("make"))?);
        let part = FileOffset::from_arc(Arc::clone(&file), 0);
        let at = u64::from(number) * bytes;
        let mapping = self.room.map(at, part, (GuestAddress(start), bytes));
        let mut mapping = mapping.map_err(failed("map"))?;
        mapping.show(&self.vm, slot).map_err(|source| MemoryError::Slot {
            start,
            bytes,
            source,
        })?;
        Ok(Unit { number, mapping, pages: Pages { file, bytes } })
    }
}

impl Unit {
    /// Which it is.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The memory for reading and writing it. Whoever clones it lets go before the unit goes.
    #[must_use]
    pub fn region(&self) -> &Arc<GuestRegionMmap> {
        self.mapping.region()
    }

    /// Makes all of it zero again and gives the host's pages back.
    ///
    /// # Errors
    ///
    /// Fails if the host can't punch a hole into the memory file.
    pub fn wipe(&self) -> Result<(), MemoryError> {
        self.pages.give_back()
    }
}

impl Pages {
    fn give_back(&self) -> Result<(), MemoryError> {
        clear(&self.file, self.bytes)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Err(error) = self.give_back() {
            log::error!("{}", crate::error_chain(&error));
        }
    }
}
