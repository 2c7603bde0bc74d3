//! The namespace: sleep state 5, the PCI host bridges, vCPUs that may come and go, the event device,
//! legacy devices.

use acpi_tables::{
    Aml,
    aml::{Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope},
    sdt::Sdt,
};

use super::{
    cpu_hotplug, ged, host_bridge, memory_hotplug, pci_hotplug,
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
    cpu_hotplug::append(&mut aml, machine.cpus, machine.max_cpus);
    host_bridge::append(&mut aml, machine.pci_segments, machine.address_bits);
    pci_hotplug::aml::append(&mut aml, machine.pci_segments);
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

/// How long a method waits for a mutex: without a limit.
pub(super) const FOR_EVER: u16 = 0xffff;

/// Bytes of AML that were made already.
pub(crate) struct Raw(pub(crate) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn scope(aml: &mut Vec<u8>, children: &[&dyn Aml]) {
    Scope::new(Path::new("_SB_"), children.to_vec()).to_aml_bytes(aml);
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
