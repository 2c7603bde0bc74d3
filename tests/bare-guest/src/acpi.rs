//! The ACPI tables a guest needs here: found and checked as an operating system does it.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::machine::{bytes, outb, read8, read16, read32, read64};

static FADT: AtomicU64 = AtomicU64::new(0);

/// One table: its signature and address.
#[derive(Clone, Copy)]
pub struct Table {
    pub signature: [u8; 4],
    pub address: u64,
}

/// Walks RSDP and XSDT, checks every checksum, and keeps the FADT for later.
pub fn tables(rsdp: u64) -> impl Iterator<Item = Table> {
    assert_eq!(bytes(rsdp, 8), b"RSD PTR ", "RSDP signature");
    assert_eq!(sum(rsdp, 20), 0, "RSDP checksum");
    assert_eq!(sum(rsdp, 36), 0, "RSDP extended checksum");
    let xsdt = check(read64(rsdp + 24));
    assert_eq!(&xsdt.signature, b"XSDT");
    let entries = (u64::from(read32(xsdt.address + 4)) - 36) / 8;
    (0..entries).map(move |entry| {
        let table = check(read64(xsdt.address + 36 + entry * 8));
        if &table.signature == b"FACP" {
            FADT.store(table.address, Ordering::Relaxed);
        }
        table
    })
}

fn check(address: u64) -> Table {
    let signature = bytes(address, 4).try_into().expect("four bytes");
    assert_eq!(sum(address, read32(address + 4) as usize), 0, "checksum of {signature:?}");
    Table { signature, address }
}

fn sum(address: u64, len: usize) -> u8 {
    bytes(address, len).iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The DSDT's address, checked.
pub fn dsdt() -> Table {
    check(read64(FADT.load(Ordering::Relaxed) + 140))
}

/// Whether the machine says it is hardware-reduced (ACPI 6.5, section 5.2.9, flag 20).
pub fn hardware_reduced() -> bool {
    read32(FADT.load(Ordering::Relaxed) + 112) & 1 << 20 != 0
}

/// A generic address structure (ACPI 6.5, section 5.2.3.2) in the FADT: ports and memory only.
fn write_register(offset: u64, value: u8) {
    let at = FADT.load(Ordering::Relaxed) + offset;
    let address = read64(at + 4);
    match read8(at) {
        0 => unsafe { (address as *mut u8).write_volatile(value) },
        1 => outb(u16::try_from(address).expect("a port"), value),
        space => panic!("register in address space {space}"),
    }
}

/// Writes S5 with SLP_EN to the sleep control register. The sleep type is fetched from the DSDT's
/// `_S5` package: name, package op, length, count, then the first element.
pub fn power_off() -> ! {
    let dsdt = dsdt();
    let body = bytes(dsdt.address, read32(dsdt.address + 4) as usize);
    let at = body.windows(4).position(|name| name == b"_S5_").expect("the DSDT has _S5");
    let element = &body[at + 7..];
    let sleep_type = if element[0] == 0x0a { element[1] } else { element[0] };
    write_register(244, sleep_type << 2 | 1 << 5);
    loop {
        core::hint::spin_loop();
    }
}

/// Writes the reset value to the reset register.
pub fn reset() -> ! {
    write_register(116, read8(FADT.load(Ordering::Relaxed) + 128));
    loop {
        core::hint::spin_loop();
    }
}

/// The ECAM base of segment 0 and the buses it covers.
pub fn ecam(mcfg: u64) -> (u64, u16, core::ops::RangeInclusive<u8>) {
    let at = mcfg + 44;
    (read64(at), read16(at + 8), read8(at + 10)..=read8(at + 11))
}

/// Local APIC ids of the enabled processors (MADT entries 0 and 9).
pub fn processors(madt: u64) -> impl Iterator<Item = u32> {
    let (mut at, end) = (madt + 44, madt + u64::from(read32(madt + 4)));
    core::iter::from_fn(move || {
        while at < end {
            let entry = at;
            at += u64::from(read8(entry + 1));
            match read8(entry) {
                0 if read32(entry + 4) & 1 == 1 => return Some(u32::from(read8(entry + 3))),
                9 if read32(entry + 8) & 1 == 1 => return Some(read32(entry + 4)),
                _ => {}
            }
        }
        None
    })
}
