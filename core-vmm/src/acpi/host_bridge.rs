//! The host bridges, one a segment: where configuration space and windows are, and the slots.
//!
//! Legacy interrupts are told too, for passed-through devices: no virtio device has a pin.

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Name, Path, ResourceTemplate,
        Scope,
    },
};

use super::interrupt_pins::PinRouting;
use super::pci_hotplug::aml::{bridge, slots};
use crate::memory::layout;

/// Adds the host bridges of so many segments.
pub(super) fn append(aml: &mut Vec<u8>, segments: u16, address_bits: u32) {
    for segment in 0..segments {
        one(
            aml,
            segment,
            &ResourceTemplate::new(resources(segment, segments, address_bits).refs()),
        );
    }
}

/// What a segment's bus takes.
struct Resources {
    bus: AddressSpace<u16>,
    /// The configuration ports and the 32-bit window are the first segment's alone.
    first: Option<(IO, AddressSpace<u32>)>,
    window: AddressSpace<u64>,
}

impl Resources {
    fn refs(&self) -> Vec<&dyn Aml> {
        let mut all: Vec<&dyn Aml> = vec![&self.bus];
        if let Some((ports, window)) = &self.first {
            all.push(ports);
            all.push(window);
        }
        all.push(&self.window);
        all
    }
}

fn resources(segment: u16, segments: u16, address_bits: u32) -> Resources {
    let uncached = AddressSpaceCacheable::NotCacheable;
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let first = (segment == 0).then(|| {
        let window = layout::PCI_WINDOW_32;
        let (start, last) = (low(window.start), low(window.end - 1));
        let window = AddressSpace::new_memory(uncached, true, start, last, None);
        (IO::new(0xcf8, 0xcf8, 1, 8), window)
    });
    let window = layout::pci_window_64_of(segment, segments, address_bits);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window.start,
        window.end - 1,
        None,
    );
    Resources { bus: AddressSpace::new_bus_number(0_u16, 0_u16), first, window }
}

fn one(aml: &mut Vec<u8>, segment: u16, resources: &ResourceTemplate<'_>) {
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&bridge(segment)),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_SEG"), &segment),
                &Name::new(Path::new("_BBN"), &0_u8),
                &Name::new(Path::new("_UID"), &segment),
                &Name::new(Path::new("_CRS"), resources),
                &PinRouting,
                &slots(segment),
            ],
        )],
    )
    .to_aml_bytes(aml);
}
