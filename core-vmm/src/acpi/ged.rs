//! The generic event device (ACPI 6.5, 5.6.9): one edge interrupt and one register that says what
//! happened, cleared by reading. Its AML turns that into notifications. What is not read is told again
//! (see [`super::reminder`]).

use std::{
    io,
    sync::atomic::{AtomicU8, Ordering},
};

use acpi_tables::{
    Aml,
    aml::{
        And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
        FieldUpdateRule, If, Interrupt, Local, Method, MethodCall, Name, Notify, OpRegion,
        OpRegionSpace, Path, ResourceTemplate, Scope, Store, ZERO,
    },
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{cpu_hotplug, pci_hotplug};
use crate::{bus::BusDevice, memory::layout};

/// Where the event register stands in [`layout::EVENT_DEVICE`].
const EVENTS_OFFSET: u64 = 0;
/// Value of `Notify` on a button that was pressed (ACPI 6.5, table 5.135).
const BUTTON_PRESSED: u8 = 0x80;

/// What the event device tells of, as bits of its register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// A vCPU was added, or is to be ejected.
    Cpus = 1 << 1,
    /// RAM was added, or is to be ejected.
    Memory = 1 << 2,
    /// The power button was pressed.
    PowerButton = 1 << 3,
    /// A PCI function was added, or is to be ejected.
    Pci = 1 << 4,
}

/// The register and the interrupt.
#[derive(Debug)]
pub struct EventDevice {
    pending: AtomicU8,
    interrupt: EventFd,
}

impl EventDevice {
    /// A device with nothing to tell.
    ///
    /// # Errors
    ///
    /// Fails if the host has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let interrupt = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self { pending: AtomicU8::new(0), interrupt })
    }

    /// What to register with KVM for [`layout::EVENT_GSI`].
    #[must_use]
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Tells the guest.
    ///
    /// # Errors
    ///
    /// Fails if the interrupt can't be raised.
    pub fn raise(&self, event: Event) -> io::Result<()> {
        self.pending.fetch_or(event as u8, Ordering::SeqCst);
        self.interrupt.write(1)
    }

    /// Whether there is something that the guest has not read.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        self.pending.load(Ordering::SeqCst) != 0
    }

    /// Raises the interrupt once more for what the guest has not read.
    ///
    /// # Errors
    ///
    /// Fails if the interrupt can't be raised.
    pub fn raise_again(&self) -> io::Result<()> {
        self.interrupt.write(1)
    }

    /// Forgets what the guest has not read.
    pub fn reset(&self) {
        self.pending.store(0, Ordering::SeqCst);
    }
}

impl BusDevice for EventDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == EVENTS_OFFSET
            && let Some(first) = data.first_mut()
        {
            *first = self.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// Adds the event device and what it notifies.
pub(super) fn append(aml: &mut Vec<u8>) {
    let region_start = layout::EVENT_DEVICE.start + EVENTS_OFFSET;
    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_GSI);
    let power_button = Path::new("\\_SB_.PWRB");
    let scan_pci = MethodCall::new(Path::new(pci_hotplug::aml::SCAN), vec![]);
    let scan_memory = MethodCall::new(Path::new("\\_SB_.MEMH.MSCN"), vec![]);
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("PWRB"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
                    &Name::new(Path::new("_UID"), &0_u8),
                ],
            ),
            &Device::new(
                Path::new("GED_"),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0013"),
                    &Name::new(Path::new("_UID"), &0_u8),
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
                    &OpRegion::new(
                        Path::new("EVTR"),
                        OpRegionSpace::SystemMemory,
                        &region_start,
                        &1_u8,
                    ),
                    &Field::new(
                        Path::new("EVTR"),
                        FieldAccessType::Byte,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        vec![FieldEntry::Named(*b"EVTS", 8)],
                    ),
                    &Method::new(
                        Path::new("_EVT"),
                        1,
                        true,
                        vec![
                            &Store::new(&Local(0), &Path::new("EVTS")),
                            &And::new(&Local(1), &Local(0), &(Event::PowerButton as u8)),
                            &If::new(
                                &Equal::new(&Local(1), &(Event::PowerButton as u8)),
                                vec![&Notify::new(&power_button, &BUTTON_PRESSED)],
                            ),
                            &And::new(&Local(1), &Local(0), &(Event::Memory as u8)),
                            &If::new(&Local(1), vec![&scan_memory]),
                            &If::new(
                                &And::new(&ZERO, &Local(0), &(Event::Cpus as u8)),
                                vec![&MethodCall::new(cpu_hotplug::scan_method(), vec![])],
                            ),
                            &And::new(&Local(1), &Local(0), &(Event::Pci as u8)),
                            &If::new(&Local(1), vec![&scan_pci]),
                        ],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_the_register_tells_once_and_interrupts_once() {
        let device = EventDevice::new().unwrap();
        device.raise(Event::PowerButton).unwrap();
        assert!(device.is_unread());
        assert_eq!(device.interrupt().read().unwrap(), 1);
        let mut data = [0xff; 4];
        device.read(0, &mut data);
        assert_eq!(data, [8, 0, 0, 0]);
        assert!(!device.is_unread());
        device.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn a_reset_forgets_what_was_not_read() {
        let device = EventDevice::new().unwrap();
        device.raise(Event::PowerButton).unwrap();
        device.reset();
        let mut data = [0xff];
        device.read(0, &mut data);
        assert_eq!(data, [0]);
    }
}
