//! A disk that comes and goes, by the hotplug registers themselves: no ACPI interpreter is here.

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

use crate::dma::Identity;
use crate::machine::{interrupts, outb, read8, read32, write32};
use crate::{pci, say};

const REGISTERS: u64 = 0xe810_0300;
const UP: u64 = REGISTERS + 0x04;
const DOWN: u64 = REGISTERS + 0x08;
const EJECT: u64 = REGISTERS + 0x0c;
const STATUS_SLOT: u64 = REGISTERS + 0x10;
const STATUS_EVENT: u64 = REGISTERS + 0x14;
const STATUS: u64 = REGISTERS + 0x18;
const EJECT_REQUEST: u32 = 3;
const BUSY: u32 = 0x82;
const VECTOR: u8 = 0x51;

/// The slot that a register names, once it names one.
fn slot(register: u64) -> u32 {
    loop {
        let slots = read32(register);
        if slots != 0 {
            assert_eq!(slots.count_ones(), 1, "one at a time");
            assert_eq!(read32(register), 0, "reading clears");
            return slots.trailing_zeros();
        }
        core::hint::spin_loop();
    }
}

/// Takes each disk, uses it and gives it up; every fifth only when it is asked again, and every
/// third without telling the device.
pub fn disks(rounds: u64) {
    // The event device's interrupt has nowhere to go here, and the PICs would send it to vector 5.
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    for round in 0..rounds {
        let added = slot(UP);
        let function = pci::find(DeviceType::Block, 0).expect("the disk that was told of");
        assert_eq!(u32::from(function.device), added);
        pci::enable(function);
        let mut disk = VirtIOBlk::<Identity, PciTransport>::new(pci::transport(function))
            .expect("the driver starts");
        pci::route_msix(function, 1, VECTOR);
        pci::set_queue_vector(function, 0, 1);
        disk.enable_interrupts();
        let pattern = [round as u8 + 1; SECTOR_SIZE];
        disk.write_blocks(1, &pattern).expect("write");
        let mut read = [0; SECTOR_SIZE];
        disk.read_blocks(1, &mut read).expect("read");
        assert_eq!(read, pattern);
        // Not what it was asked for yet.
        write32(EJECT, added);
        assert!(pci::find(DeviceType::Block, 0).is_some());
        say!("used {round}");
        assert_eq!(slot(DOWN), added);
        if round % 5 == 0 {
            write32(STATUS_SLOT, added);
            write32(STATUS_EVENT, EJECT_REQUEST);
            write32(STATUS, BUSY);
            assert_eq!(slot(DOWN), added);
        }
        if round % 3 == 0 {
            core::mem::forget(disk);
        } else {
            drop(disk);
        }
        write32(EJECT, added);
        assert!(pci::find(DeviceType::Block, 0).is_none(), "nothing is there any more");
        say!("ejected {round}");
    }
}

/// The I/O APIC's index and data registers, and its entry for the event device's interrupt.
const IO_APIC: u64 = 0xfec0_0000;
const IO_APIC_DATA: u64 = 0xfec0_0010;
const EVENT_ENTRY: u32 = 0x10 + 2 * 5;
/// The event device's byte and its bit for PCI functions.
const EVENTS: u64 = 0xe810_0000;
const PCI: u8 = 1 << 4;

/// Has no ear for the event device until a disk was told of, as a kernel that boots.
pub fn late() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    say!("deaf");
    // Told of, and the interrupt is raised and lost in the same moment or the next.
    slot(UP);
    assert_eq!(interrupts(VECTOR), 0);
    say!("told");
    super::wait_for_input();
    // An edge, to the first processor.
    write32(IO_APIC, EVENT_ENTRY + 1);
    write32(IO_APIC_DATA, 0);
    write32(IO_APIC, EVENT_ENTRY);
    write32(IO_APIC_DATA, VECTOR.into());
    while interrupts(VECTOR) == 0 {
        core::hint::spin_loop();
    }
    assert_eq!(read8(EVENTS), PCI);
}
