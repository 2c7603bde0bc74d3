//! The static tables and how they point to each other. ACPI 6.5, chapter 5.

use acpi_tables::{
    Aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::IoApic,
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::dsdt;
use crate::{
    legacy::power,
    memory::{hotplug::Plan, layout},
};

pub(super) const OEM_ID: [u8; 6] = *b"NACRE ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"NACREVMM";
pub(super) const OEM_REVISION: u32 = 1;

/// No VGA; PCIe power management is not the guest's. No 8042 bit and a CMOS clock: both by
/// leaving their bits clear (ACPI 6.5, table 5.10).
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 4;

/// Tables start at a multiple of this.
const TABLE_ALIGN: usize = 16;

/// What the tables tell of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// vCPUs that are there, the first ones. Their APIC ids are their indexes.
    pub cpus: u32,
    /// vCPUs that can be there.
    pub max_cpus: u32,
    /// The guest's physical address width.
    pub address_bits: u32,
    /// PCI segments, at least 1.
    pub pci_segments: u16,
    /// Whether there is a serial port.
    pub has_serial: bool,
    /// The RAM that can be plugged.
    pub memory: Plan,
}

/// Why the tables are not in memory.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Too many things to tell of.
    #[error("the ACPI tables of {0} bytes don't fit into their area")]
    TooLarge(usize),
    /// Guest memory does not reach there.
    #[error("the ACPI tables are outside guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Tables under construction, back to back from the start of their area.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table and gives its physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(TABLE_ALIGN), 0);
        let address = layout::ACPI_TABLES.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// Writes all tables, the RSDP first.
///
/// # Errors
///
/// Fails if they don't fit.
pub fn write(machine: &Machine, memory: &GuestMemoryMmap) -> Result<(), AcpiError> {
    let bytes = build(machine);
    if bytes.len() as u64 > layout::ACPI_TABLES.end - layout::ACPI_TABLES.start {
        return Err(AcpiError::TooLarge(bytes.len()));
    }
    memory.write_slice(&bytes, GuestAddress(layout::ACPI_TABLES.start))?;
    Ok(())
}

fn build(machine: &Machine) -> Vec<u8> {
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.add(&dsdt::table(machine));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(area.add(&fadt(dsdt).finalize()));
    xsdt.add_entry(area.add(&madt(machine)));
    xsdt.add_entry(area.add(&mcfg(machine)));
    let xsdt = area.add(&xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    area.bytes
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let port = |offset: u64| {
        let address = power::PORT + offset;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt
}

/// The first APIC id that is no local APIC's of eight bits: there, all ones means everyone.
pub(super) const FIRST_X2APIC_ID: u32 = 255;
const MADT_HEADER_BYTES: u32 = 44;
/// The first with the bit for a processor that can come (ACPI 6.3).
const MADT_REVISION: u8 = 5;
const LOCAL_APIC_ENTRY: u8 = 0;
const X2APIC_ENTRY: u8 = 9;
const ENABLED: u32 = 1 << 0;
const ONLINE_CAPABLE: u32 = 1 << 1;

/// A vCPU's entry in the MADT (ACPI 6.5, 5.2.12.2 and 5.2.12.12); its `_UID` is its index too.
pub(super) fn processor(index: u32, is_there: bool) -> Vec<u8> {
    let flags = if is_there { ENABLED } else { ONLINE_CAPABLE }.to_le_bytes();
    let id = index.to_le_bytes();
    if index < FIRST_X2APIC_ID {
        [&[LOCAL_APIC_ENTRY, 8, id[0], id[0]][..], &flags].concat()
    } else {
        [&[X2APIC_ENTRY, 16, 0, 0][..], &id, &flags, &id].concat()
    }
}

fn madt(machine: &Machine) -> Sdt {
    let (revision, id) = (MADT_REVISION, (OEM_ID, OEM_TABLE_ID));
    let mut madt = Sdt::new(*b"APIC", MADT_HEADER_BYTES, revision, id.0, id.1, OEM_REVISION);
    madt.write_u32(36, layout::LOCAL_APIC);
    for index in 0..machine.max_cpus {
        madt.append_slice(&processor(index, index < machine.cpus));
    }
    let mut io_apic = Vec::new();
    IoApic::new(0, layout::IO_APIC, 0).to_aml_bytes(&mut io_apic);
    madt.append_slice(&io_apic);
    madt.update_checksum();
    madt
}

fn mcfg(machine: &Machine) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for segment in 0..machine.pci_segments {
        mcfg.add_ecam(layout::ecam(segment).start, segment, 0, 0);
    }
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{memory::layout::Ram, vcpu};

    fn machine(cpus: u32, max_cpus: u32) -> Machine {
        let memory = Plan::new(&Ram::of(1 << 30), 1 << 35, 40).unwrap();
        let pci_segments = 1;
        Machine { cpus, max_cpus, address_bits: 40, pci_segments, has_serial: true, memory }
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table at a physical address, whose checksum must be right.
    fn table(area: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - layout::ACPI_TABLES.start).unwrap();
        let len = u32::from_le_bytes(area[start + 4..start + 8].try_into().unwrap());
        let table = &area[start..start + usize::try_from(len).unwrap()];
        assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        table
    }

    #[test]
    fn the_rsdp_leads_to_every_table() {
        let area = build(&machine(4, 4));
        assert_eq!(&area[..8], b"RSD PTR ");
        let xsdt = table(&area, u64_at(&area, 24));
        let signatures: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&area, u64_at(entry, 0))[..4].to_vec())
            .collect();
        assert_eq!(signatures, [b"FACP".to_vec(), b"APIC".to_vec(), b"MCFG".to_vec()]);
        let fadt = table(&area, u64_at(xsdt, 36));
        assert_eq!(&table(&area, u64_at(fadt, 140))[..4], b"DSDT");
    }

    #[test]
    fn the_madt_lists_each_vcpu_and_the_io_apic() {
        let area = build(&machine(3, 3));
        let xsdt = table(&area, u64_at(&area, 24));
        let madt = table(&area, u64_at(xsdt, 44));
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!(madt[44 + 2 * 8..44 + 3 * 8], [0, 8, 2, 2, 1, 0, 0, 0]);
    }

    #[test]
    fn vcpus_that_can_come_are_told_from_those_that_are_there_beyond_eight_bits_too() {
        let area = build(&machine(256, 300));
        let xsdt = table(&area, u64_at(&area, 24));
        let madt = table(&area, u64_at(xsdt, 44));
        assert_eq!(madt.len(), 44 + 255 * 8 + 45 * 16 + 12);
        let last_small = 44 + 254 * 8;
        assert_eq!(madt[last_small..last_small + 8], [0, 8, 254, 254, 1, 0, 0, 0]);
        let mut entries = madt[last_small + 8..].chunks(16);
        let first = [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0];
        assert_eq!(entries.next().unwrap(), first);
        let absent = [9, 16, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0];
        assert_eq!(entries.next().unwrap(), absent);
    }

    #[test]
    fn the_mcfg_lists_the_ecam_of_each_segment() {
        let area = build(&Machine { pci_segments: 3, ..machine(1, 1) });
        let xsdt = table(&area, u64_at(&area, 24));
        let mcfg = table(&area, u64_at(xsdt, 52));
        assert_eq!(mcfg.len(), 44 + 3 * 16);
        for (segment, entry) in (0..).zip(mcfg[44..].chunks(16)) {
            assert_eq!(u64_at(entry, 0), layout::ecam(segment).start);
            assert_eq!(entry[8..12], [u8::try_from(segment).unwrap(), 0, 0, 0]);
        }
    }

    #[test]
    fn the_largest_machine_fits() {
        let pci_segments = layout::MAX_PCI_SEGMENTS;
        let area = build(&Machine { pci_segments, ..machine(1, vcpu::MAX_VCPUS) });
        let room = layout::ACPI_TABLES.end - layout::ACPI_TABLES.start;
        assert!(area.len() as u64 <= room, "{} in {room}", area.len());
    }
}
