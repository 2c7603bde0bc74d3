//! The namespace: sleep state 5, the PCI host bridge, vCPUs that may come and go, the event device,
//! legacy devices.

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, Path,
        ResourceTemplate, Scope,
    },
    sdt::Sdt,
};

use super::{
    cpu_hotplug, ged, memory_hotplug,
    tables::{Machine, OEM_ID, OEM_REVISION, OEM_TABLE_ID},
};
use crate::{
    legacy::{panic, power, rtc, serial},
    memory::layout,
};

const SDT_HEADER_BYTES: u32 = 36;
/// From 2 on AML integers have 64 bits.
const REVISION: u8 = 2;

/// The whole table.
pub(super) fn table(machine: &Machine) -> Sdt {
    let mut sdt =
        Sdt::new(*b"DSDT", SDT_HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    let sleep_5 = power::SLEEP_TYPE_OFF;
    Name::new(Path::new("_S5_"), &Package::new(vec![&sleep_5, &sleep_5])).to_aml_bytes(&mut aml);
    scope(&mut aml, &[&host_bridge(machine)]);
    cpu_hotplug::append(&mut aml, machine.cpus, machine.max_cpus);
    ged::append(&mut aml);
    memory_hotplug::append(&mut aml, &machine.memory);
    if machine.has_serial {
        legacy(&mut aml, "COM1", Legacy::Serial);
    }
    legacy(&mut aml, "RTC_", Legacy::Clock);
    legacy(&mut aml, "PEVT", Legacy::PanicPort);
    sdt.append_slice(&aml);
    sdt.update_checksum();
    sdt
}

/// Bytes of AML that were made already.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn scope(aml: &mut Vec<u8>, children: &[&dyn Aml]) {
    Scope::new(Path::new("_SB_"), children.to_vec()).to_aml_bytes(aml);
}

/// One bus, its configuration ports and its two windows. There is no `_PRT`: no device has an
/// interrupt pin.
fn host_bridge(machine: &Machine) -> Raw {
    let window_32 = layout::PCI_WINDOW_32;
    let window_64 = layout::pci_window_64(machine.address_bits);
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let mut aml = Vec::new();
    Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_SEG"), &0_u8),
            &Name::new(Path::new("_BBN"), &0_u8),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0_u16, 0_u16),
                    &IO::new(0xcf8, 0xcf8, 1, 8),
                    &AddressSpace::new_memory(
                        uncached,
                        true,
                        low(window_32.start),
                        low(window_32.end - 1),
                        None,
                    ),
                    &AddressSpace::new_memory(
                        uncached,
                        true,
                        window_64.start,
                        window_64.end - 1,
                        None,
                    ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    Raw(aml)
}

/// A device with ports, maybe an interrupt, and nothing else.
#[derive(Clone, Copy)]
enum Legacy {
    Serial,
    Clock,
    PanicPort,
}

fn legacy(aml: &mut Vec<u8>, name: &str, kind: Legacy) {
    let path = Path::new(name);
    let uid = Name::new(Path::new("_UID"), &0_u8);
    let resources = |template| Name::new(Path::new("_CRS"), &template);
    let id = |name| Name::new(Path::new("_HID"), &EISAName::new(name));
    match kind {
        Legacy::Serial => {
            let port = serial::PORT;
            let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
            let io = IO::new(port, port, 0, 8);
            let crs = resources(ResourceTemplate::new(vec![&io, &interrupt]));
            scope(aml, &[&Device::new(path, vec![&id("PNP0501"), &uid, &crs])]);
        }
        Legacy::Clock => {
            let io = IO::new(rtc::PORT, rtc::PORT, 0, 2);
            let crs = resources(ResourceTemplate::new(vec![&io]));
            scope(aml, &[&Device::new(path, vec![&id("PNP0B00"), &uid, &crs])]);
        }
        // QEMU's docs/specs/pvpanic: the device has a string for its id.
        Legacy::PanicPort => {
            let io = IO::new(panic::PORT, panic::PORT, 1, 1);
            let crs = resources(ResourceTemplate::new(vec![&io]));
            let id = Name::new(Path::new("_HID"), &"QEMU0001");
            scope(aml, &[&Device::new(path, vec![&id, &uid, &crs])]);
        }
    }
}
