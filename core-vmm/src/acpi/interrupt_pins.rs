//! Where the legacy interrupts of PCI functions go: `_PRT`, the same for every host bridge. Only
//! passed-through devices have such an interrupt.

use acpi_tables::{
    Aml, AmlSink,
    aml::{Name, Package, Path},
};

use crate::{passthrough::line, pci::Slot, pci::slot::SLOT_COUNT};

/// All functions of a slot (ACPI 6.5, section 6.2.13).
const ANY_FUNCTION: u32 = 0xffff;
/// The first pin; no function here has another.
const PIN_A: u8 = 0;
/// The pin is one of the I/O APIC's, by its number.
const IO_APIC: u8 = 0;

/// The table's name and content.
pub(super) struct PinRouting;

impl Aml for PinRouting {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let routes: Vec<(u32, u32)> = (1..SLOT_COUNT)
            .filter_map(Slot::new)
            .map(|slot| (u32::from(slot.number()) << 16 | ANY_FUNCTION, line::pin_of(slot)))
            .collect();
        let entries: Vec<Package<'_>> = routes
            .iter()
            .map(|(address, pin)| Package::new(vec![address, &PIN_A, &IO_APIC, pin]))
            .collect();
        let entries = Package::new(entries.iter().map(|entry| entry as &dyn Aml).collect());
        Name::new(Path::new("_PRT"), &entries).to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_but_the_host_bridge_s_has_a_pin() {
        let mut bytes = Vec::new();
        PinRouting.to_aml_bytes(&mut bytes);
        assert_eq!(&bytes[..5], b"\x08_PRT");
        // Slot 9's: a package of four, a double word, two zeros, the pin.
        let wanted = [0x12, 0x0b, 4, 0x0c, 0xff, 0xff, 9, 0, 0, 0, 0x0a, 17];
        assert_eq!(bytes.windows(wanted.len()).filter(|part| *part == wanted).count(), 1);
    }
}
