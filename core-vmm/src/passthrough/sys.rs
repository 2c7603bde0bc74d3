#![expect(unsafe_code, reason = "a device's registers are given to KVM by address")]
//! A part of a device's BAR that the guest reaches without a trap: a mapping, and KVM's memory slot
//! that shows it to the guest.

use std::io;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vfio::Mapping;

use crate::memory::slots::Slot;

/// The mapping and its slot, in which it is shown or not.
pub(super) struct Window {
    vm: Arc<VmFd>,
    slot: Slot,
    /// Dropped by hand: not while KVM has its address.
    mapping: ManuallyDrop<Mapping>,
    is_shown: bool,
}

impl Window {
    /// Not shown yet.
    pub(super) fn new(vm: Arc<VmFd>, slot: Slot, mapping: Mapping) -> Self {
        Self { vm, slot, mapping: ManuallyDrop::new(mapping), is_shown: false }
    }

    fn set(&self, guest_phys_addr: u64, memory_size: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.slot.number(),
            flags: 0,
            guest_phys_addr,
            memory_size,
            userspace_addr: self.mapping.address(),
        };
        // SAFETY: the range is all of a mapping of a device's registers, in which nothing of this
        // process lies, and which is unmapped only when KVM has forgotten the slot.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(Into::into)
    }

    /// Shows it to the guest at `address` and nowhere else.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses; it is not shown then.
    pub(super) fn show_at(&mut self, address: u64) -> io::Result<()> {
        self.hide()?;
        self.set(address, self.mapping.len_bytes())?;
        self.is_shown = true;
        Ok(())
    }

    /// Shows it no longer.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses.
    pub(super) fn hide(&mut self) -> io::Result<()> {
        if self.is_shown {
            // A slot of no size is none.
            self.set(0, 0)?;
            self.is_shown = false;
        }
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        match self.hide() {
            // SAFETY: it is dropped once, here, and not used after.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.mapping) },
            // The mapping stays for ever, as KVM still knows it.
            Err(error) => log::error!("KVM keeps a device's registers mapped: {error}"),
        }
    }
}
