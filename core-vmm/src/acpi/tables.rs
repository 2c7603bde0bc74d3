//! The static tables and how they point to each other. ACPI 6.5, chapter 5.

use acpi_tables::{
    Aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
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
    /// vCPUs, whose APIC ids are their indexes.
    pub cpus: u32,
    /// The guest's physical address width.
    pub address_bits: u32,
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
    xsdt.add_entry(area.add(&mcfg()));
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

fn madt(machine: &Machine) -> MADT {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for index in 0..machine.cpus {
        // `vcpu::create` allows none above 253.
        let id = u8::try_from(index).unwrap_or(u8::MAX);
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::Ram;

    fn machine(cpus: u32) -> Machine {
        let memory = Plan::new(&Ram::of(1 << 30), 1 << 35, 40).unwrap();
        Machine { cpus, address_bits: 40, has_serial: true, memory }
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
        let area = build(&machine(4));
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
        let area = build(&machine(3));
        let xsdt = table(&area, u64_at(&area, 24));
        let madt = table(&area, u64_at(xsdt, 44));
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!(madt[44 + 2 * 8..44 + 3 * 8], [0, 8, 2, 2, 1, 0, 0, 0]);
    }

    #[test]
    fn the_largest_machine_fits() {
        let area = build(&machine(254));
        assert!(area.len() as u64 <= layout::ACPI_TABLES.end - layout::ACPI_TABLES.start);
    }
}
