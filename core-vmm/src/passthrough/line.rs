//! A passed-through device's legacy interrupt, for drivers and devices that have no other.
//!
//! ```text
//! device --(VFIO, which masks it)--> eventfd --(irqfd)--> I/O APIC's pin, raised
//! device <--(VFIO, unmasked)-------- eventfd <--(KVM)---- the guest has ended the interrupt
//! ```
//!
//! Which pin follows from the slot, so that it can be told in ACPI for all slots at once. Functions
//! share pins, as on any bus; KVM keeps apart who raised one.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vfio::{Device, InterruptKind};
use vmm_sys_util::eventfd::EventFd;

use super::{AssignError, event};
use crate::pci::Slot;

/// The first pin of the I/O APIC that no legacy device has.
const FIRST_PIN: u8 = 16;
/// From there to the last one.
const PINS: u8 = 8;

/// The pin of a function in `slot`, whatever the segment.
#[must_use]
pub fn pin_of(slot: Slot) -> u32 {
    u32::from(FIRST_PIN + slot.number() % PINS)
}

/// The line of one device.
pub(super) struct Line {
    vm: Arc<VmFd>,
    device: Arc<Device>,
    raised: EventFd,
    ended: EventFd,
    /// The pin that it raises, once the device has a slot.
    pin: Option<u32>,
    is_on: bool,
}

impl Line {
    /// Off, if the device has a line at all.
    ///
    /// # Errors
    ///
    /// Fails if no descriptor is left.
    pub(super) fn new(vm: Arc<VmFd>, device: Arc<Device>) -> Result<Option<Self>, AssignError> {
        if device.interrupts(InterruptKind::IntX) == 0 {
            return Ok(None);
        }
        let (raised, ended) = (event()?, event()?);
        Ok(Some(Self { vm, device, raised, ended, pin: None, is_on: false }))
    }

    /// It raises this pin from now on.
    pub(super) fn set_pin(&mut self, pin: u32) {
        debug_assert!(!self.is_on, "a device is put into its slot once");
        self.pin = Some(pin);
    }

    /// Lets the device raise its pin.
    ///
    /// # Errors
    ///
    /// Fails if KVM or VFIO refuses; it is off then.
    pub(super) fn switch_on(&mut self) -> io::Result<()> {
        let Some(pin) = self.pin.filter(|_pin| !self.is_on) else { return Ok(()) };
        self.vm.register_irqfd_with_resample(&self.raised, &self.ended, pin)?;
        self.is_on = true;
        let sent = self
            .device
            .send_to(InterruptKind::IntX, 0, &[Some(&self.raised)])
            .and_then(|()| self.device.unmask_on(&self.ended));
        sent.map_err(|error| self.switch_off().err().unwrap_or_else(|| io::Error::other(error)))
    }

    /// The device raises nothing any more.
    ///
    /// # Errors
    ///
    /// Fails if KVM or VFIO refuses.
    pub(super) fn switch_off(&mut self) -> io::Result<()> {
        let Some(pin) = self.pin.filter(|_pin| self.is_on) else { return Ok(()) };
        self.is_on = false;
        let silenced = self.device.silence(InterruptKind::IntX).map_err(io::Error::other);
        // This also lowers the pin, if it was the last one that raised it.
        self.vm.unregister_irqfd(&self.raised, pin)?;
        silenced
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Err(error) = self.switch_off() {
            log::warn!("a device's line stays on: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_go_round_above_those_of_legacy_devices() {
        let pin = |number| pin_of(Slot::new(number).unwrap());
        assert_eq!([pin(0), pin(1), pin(7), pin(8), pin(31)], [16, 17, 23, 16, 23]);
    }
}
