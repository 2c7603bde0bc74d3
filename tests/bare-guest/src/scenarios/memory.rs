//! RAM that comes and goes, driven by the controller's registers alone.

use alloc::vec::Vec;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

use crate::dma::Identity;
use crate::load::wait_for_order;
use crate::machine::{inb, read32, read64, write32, write64};
use crate::{acpi, pci, say};

const REGISTERS: u64 = 0xe810_0200;
const SELECT: u64 = REGISTERS;
const NEXT: u64 = REGISTERS + 4;
const STATUS: u64 = REGISTERS + 8;
const EVENT: u64 = REGISTERS + 0xc;
const REPORT: u64 = REGISTERS + 0x10;
const NONE: u32 = u32::MAX;

const UNIT_BYTES: u64 = 128 << 20;
const CHUNK_BYTES: usize = 64 << 10;

type Disk = VirtIOBlk<Identity, PciTransport>;

fn start_of(unit: u32) -> u64 {
    (4 << 30) + u64::from(unit) * UNIT_BYTES
}

fn chunk(address: u64) -> &'static mut [u8] {
    // It is RAM that nothing else uses.
    unsafe { core::slice::from_raw_parts_mut(address as *mut u8, CHUNK_BYTES) }
}

/// Uses what has come, and does what the host orders with what is to go.
pub fn run() {
    let mut disk = pci::find(DeviceType::Block, 0).map(|function| {
        pci::enable(function);
        Disk::new(pci::transport(function)).expect("the driver starts")
    });
    let mut used = Vec::new();
    for unit in 0.. {
        write32(SELECT, unit);
        if read32(STATUS) & 1 == 0 {
            break;
        }
        use_unit(unit, &mut disk);
        used.push(unit);
    }
    say!("found {}", used.len());
    loop {
        let unit = read32(NEXT);
        if unit != NONE {
            take_news(unit, &mut disk, &mut used);
        } else if inb(0x3fd) & 1 != 0 {
            match wait_for_order() {
                b'r' => acpi::reset(),
                b'c' => {
                    used.iter().for_each(|unit| look_again(*unit, &mut disk));
                    say!("checked {}", used.len());
                }
                b'h' => be_hostile(),
                _ => break,
            }
        }
    }
    used.iter().for_each(|unit| look_again(*unit, &mut disk));
}

fn take_news(unit: u32, disk: &mut Option<Disk>, used: &mut Vec<u32>) {
    write32(SELECT, unit);
    let status = read32(STATUS);
    write32(STATUS, status & 0b110);
    if status & 0b10 != 0 {
        use_unit(unit, disk);
        used.push(unit);
        report(1, 0);
        say!("came {unit}");
    }
    if status & 0b100 == 0 {
        return;
    }
    report(3, 0x84);
    say!("asked {unit}");
    match wait_for_order() {
        b'k' => report(3, 0x82),
        // The machine is reset with the unit on its way.
        b'r' => acpi::reset(),
        _ => {
            used.retain(|other| *other != unit);
            write32(STATUS, 1 << 3);
            assert_eq!(read32(STATUS), 0, "unit {unit} after its ejection");
            report(3, 0);
            say!("ejected {unit}");
        }
    }
}

fn report(event: u32, code: u32) {
    write32(EVENT, event);
    write32(REPORT, code);
}

/// It is zero, can be written, and the disk can reach it.
fn use_unit(unit: u32, disk: &mut Option<Disk>) {
    let (start, last) = (start_of(unit), start_of(unit) + UNIT_BYTES - 8);
    for address in [start, start + UNIT_BYTES / 2, last] {
        assert_eq!(read64(address), 0, "unit {unit} at {address:#x}");
        write64(address, address);
    }
    if let Some(disk) = disk {
        let from = chunk(start + (1 << 20));
        from.fill(unit as u8 + 1);
        disk.write_blocks(sector_of(unit), from).expect("a write from RAM that came");
    }
    look_again(unit, disk);
}

fn look_again(unit: u32, disk: &mut Option<Disk>) {
    let (start, last) = (start_of(unit), start_of(unit) + UNIT_BYTES - 8);
    for address in [start, start + UNIT_BYTES / 2, last] {
        assert_eq!(read64(address), address, "unit {unit}");
    }
    if let Some(disk) = disk {
        let into = chunk(last - (2 << 20) + 8);
        into.fill(0);
        disk.read_blocks(sector_of(unit), into).expect("a read into RAM that came");
        assert!(into.iter().all(|byte| *byte == unit as u8 + 1), "unit {unit} on the disk");
    }
}

fn sector_of(unit: u32) -> usize {
    unit as usize * CHUNK_BYTES / 512
}

/// Writes what makes no sense, everywhere.
fn be_hostile() {
    for value in [0, 1, 3, 8, 0xf, 0x80, 0x82, 0x103, 0x7fff_ffff, NONE] {
        for unit in [0, 1, 255, 256, NONE] {
            write32(SELECT, unit);
            write32(EVENT, value);
            write32(REPORT, value);
            write32(STATUS, value & !0b110);
            write32(NEXT, value);
            write32(REGISTERS + 0x3c, value);
        }
    }
    for offset in (0..0x40_u64).step_by(2) {
        crate::machine::write16(REGISTERS + offset, 0xffff);
        crate::machine::read8(REGISTERS + offset + 1);
        read64(REGISTERS + (offset & !7));
    }
    say!("done its worst");
}
