//! The machine itself: memory map, tables, bus, clock.

use crate::acpi::{self, Table};
use crate::machine::{self, inb, outb, read32, read64, write32, write64};
use crate::pci::{self, Ports};
use crate::say;
use crate::start_info::StartInfo;
use virtio_drivers::transport::pci::bus::PciRoot;

/// The map's RAM is there: its first and last page hold what is written. `total=N` is checked by
/// the host.
pub fn memory(info: StartInfo) {
    let mut ram = 0;
    for range in info.memory_map() {
        say!("memory {:#x}+{:#x} kind {}", range.address, range.len, range.kind);
        if range.kind != 1 {
            continue;
        }
        ram += range.len;
        let last = range.address + range.len - 8;
        // The image, the VMM's tables and the zero page lie low; the end of a range is free.
        write64(last, 0x6e61_6372_6500_0000 | last & 0xffff);
        assert_eq!(read64(last), 0x6e61_6372_6500_0000 | last & 0xffff, "RAM at {last:#x}");
    }
    say!("total={ram}");
}

/// The tables a hardware-reduced machine has, and a DSDT with the names a kernel looks for.
pub fn acpi(tables: &[Table]) {
    for wanted in [b"FACP", b"APIC", b"MCFG"] {
        assert!(tables.iter().any(|table| &table.signature == wanted), "no {wanted:?}");
    }
    assert!(acpi::hardware_reduced(), "hardware-reduced ACPI");
    let dsdt = acpi::dsdt();
    assert_eq!(&dsdt.signature, b"DSDT");
    let body = machine::bytes(dsdt.address, read32(dsdt.address + 4) as usize);
    for name in [b"_S5_", b"PCI0", b"_CRS"] {
        assert!(body.windows(4).any(|window| window == name), "no {name:?} in the DSDT");
    }
}

/// Ports and ECAM show the same bus, and an absent function reads as all ones.
pub fn pci(tables: &[Table]) {
    let mcfg = tables.iter().find(|table| &table.signature == b"MCFG").expect("an MCFG");
    let (base, segment, buses) = acpi::ecam(mcfg.address);
    assert_eq!((segment, *buses.start()), (0, 0));
    let by_ports = PciRoot::new(Ports);
    let by_ecam = pci::ecam_root(base);
    let mut seen = by_ecam.enumerate_bus(0);
    let mut count = 0;
    for (function, info) in by_ports.enumerate_bus(0) {
        let (other_function, other) = seen.next().expect("ECAM shows the function too");
        assert_eq!((function, info.vendor_id), (other_function, other.vendor_id));
        say!("pci {function} {:04x}:{:04x}", info.vendor_id, info.device_id);
        count += 1;
    }
    assert!(seen.next().is_none(), "ECAM shows no more than the ports");
    assert!(count >= 1, "at least the host bridge");
    assert_eq!(read32(base + (31 << 15)), u32::MAX, "an absent function reads as ones");
}

/// CPUID says that this is a virtual machine with a local x2APIC, and who the hypervisor is.
pub fn cpuid() {
    let [_, ebx, ecx, _] = machine::cpuid(1, 0);
    assert_ne!(ecx & 1 << 31, 0, "the hypervisor bit");
    assert_eq!(ebx >> 24, 0, "the boot processor's APIC id");
    let [_, b, c, d] = machine::cpuid(0x4000_0000, 0);
    let name: alloc::vec::Vec<u8> = [b, c, d].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(&name[..9], b"KVMKVMKVM");
    let [eax, ..] = machine::cpuid(0x8000_0008, 0);
    say!("physical bits {}", eax & 0xff);
    assert!(eax & 0xff >= 36, "physical address bits");
    let [_, threads, level, id] = machine::cpuid(0xb, 0);
    say!("topology {threads} {level:#x} {id}");
}

/// The clock answers, never says that it is being updated, and holds a plausible time.
pub fn clock() {
    let register = |index| {
        outb(0x70, index);
        inb(0x71)
    };
    assert_eq!(register(0x0a) & 0x80, 0, "update in progress");
    assert_ne!(register(0x0d) & 0x80, 0, "valid time");
    let decimal = |value: u8| u32::from(value >> 4) * 10 + u32::from(value & 15);
    let binary = register(0x0b) & 4 != 0;
    let field = |index| if binary { u32::from(register(index)) } else { decimal(register(index)) };
    let (year, month, day) = (field(9), field(8), field(7));
    assert!((1..=12).contains(&month) && (1..=31).contains(&day), "{year}-{month}-{day}");
    say!("clock={:02}-{month:02}-{day:02} {:02}:{:02}", year, field(4), field(2));
}

/// The local APIC's timer wakes a halted processor, again and again.
pub fn timer() {
    const VECTOR: u8 = 0x60;
    for round in 1..=10 {
        write32(0xfee0_03e0, 0b1011); // divide by 1
        write32(0xfee0_0320, u32::from(VECTOR)); // one-shot
        write32(0xfee0_0380, 20_000_000);
        machine::wait_for_interrupt();
        assert_eq!(machine::interrupts(VECTOR), round, "one interrupt for each one-shot");
    }
}

/// Tells the VMM of a panic by the pvpanic device's port.
pub fn panic_device() {
    assert_ne!(inb(0x505) & 1, 0, "pvpanic offers the panic event");
    outb(0x505, 1);
    loop {
        core::hint::spin_loop();
    }
}

/// An exception without a handler.
pub fn triple_fault() {
    unsafe { core::arch::asm!("ud2") }
}
