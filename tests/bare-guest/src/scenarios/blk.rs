//! The block device, by the `virtio-drivers` crate.

use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::DeviceFunction;

use crate::dma::Identity;
use crate::machine::{interrupts as count, read8};
use crate::{acpi, pci, say};

type Disk = VirtIOBlk<Identity, PciTransport>;

const VECTOR: u8 = 0x51;

fn disk() -> (DeviceFunction, Disk) {
    let function = pci::find(DeviceType::Block, 0).expect("a block device");
    pci::enable(function);
    (function, Disk::new(pci::transport(function)).expect("the driver starts"))
}

fn pattern(sector: usize) -> [u8; SECTOR_SIZE] {
    core::array::from_fn(|at| (sector * 31 + at * 7) as u8)
}

/// Writes a pattern all over the disk, reads it back, flushes, asks for the serial. What the host
/// wrote in sector 0 is told, so that the host can compare.
pub fn read_write_flush() {
    let (_, mut disk) = disk();
    let sectors = disk.capacity() as usize;
    say!("capacity={sectors}");
    let mut first = [0; SECTOR_SIZE];
    disk.read_blocks(0, &mut first).expect("read sector 0");
    let text = core::str::from_utf8(&first).expect("text").trim_end_matches('\0');
    say!("sector0={text}");
    let step = (sectors / 64).max(1);
    for sector in (1..sectors).step_by(step) {
        disk.write_blocks(sector, &pattern(sector)).expect("write");
    }
    disk.flush().expect("flush");
    for sector in (1..sectors).step_by(step) {
        let mut read = [0; SECTOR_SIZE];
        disk.read_blocks(sector, &mut read).expect("read");
        assert_eq!(read, pattern(sector), "sector {sector}");
    }
    let mut long = alloc::vec![0x5a_u8; 64 << 10];
    disk.write_blocks(8, &long).expect("a long write");
    long.fill(0);
    disk.read_blocks(8, &mut long).expect("a long read");
    assert!(long.iter().all(|byte| *byte == 0x5a), "a long transfer");
    assert!(disk.read_blocks(sectors, &mut first).is_err(), "a read past the end fails");
    let mut id = [0; 20];
    let len = disk.device_id(&mut id).expect("the serial");
    say!("serial={}", core::str::from_utf8(&id[..len]).expect("text"));
}

/// Completions interrupt by MSI-X; a masked vector stays pending and fires when unmasked. A driver
/// that polls moves the index at which it wants the next interrupt, so each request is taken back
/// only after its interrupt came. A device may interrupt once when its queue starts.
pub fn interrupts() {
    let (function, mut disk) = disk();
    pci::route_msix(function, 1, VECTOR);
    pci::set_queue_vector(function, 0, 1);
    disk.enable_interrupts();
    for _round in 0..50 {
        let before = count(VECTOR);
        read_waiting_for(&mut disk, |disk| count(VECTOR) > before && disk.peek_used().is_some());
    }
    let interrupts = count(VECTOR);
    assert!((50..=51).contains(&interrupts), "{interrupts} interrupts");
    pci::mask_msix(function, 1, true);
    // An interrupt that was on its way has come when this read is over.
    read_waiting_for(&mut disk, |disk| disk.peek_used().is_some());
    let before = count(VECTOR);
    read_waiting_for(&mut disk, |disk| disk.peek_used().is_some());
    assert_eq!(count(VECTOR), before, "masked");
    pci::mask_msix(function, 1, false);
    while count(VECTOR) == before {
        core::hint::spin_loop();
    }
    say!("interrupts={}", count(VECTOR));
}

/// Reads sector 0 and takes the answer when `done` says so.
fn read_waiting_for(disk: &mut Disk, done: impl Fn(&mut Disk) -> bool) {
    let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
    let mut sector = [0; SECTOR_SIZE];
    // The buffers outlive the request: it is completed before this function returns.
    let token = unsafe { disk.read_blocks_nb(0, &mut request, &mut sector, &mut response) };
    let token = token.expect("a free descriptor");
    while !done(disk) {
        core::hint::spin_loop();
    }
    let read = unsafe { disk.complete_read_blocks(token, &request, &mut sector, &mut response) };
    read.expect("the read succeeds");
}

/// A reset puts the device back to its start and it can be driven again, with new rings.
pub fn device_reset() {
    for round in 0..5_u8 {
        let (function, mut disk) = disk();
        disk.write_blocks(3, &[round; SECTOR_SIZE]).expect("write");
        drop(disk);
        assert_eq!(read8(pci::common_config(function) + 20), 0, "status after reset");
        let (_, mut disk) = self::disk();
        let mut read = [0; SECTOR_SIZE];
        disk.read_blocks(3, &mut read).expect("read after reset");
        assert_eq!(read, [round; SECTOR_SIZE]);
    }
}

/// Resets the machine once, as soon as `when` returns; the disk remembers that it did.
pub fn reboot(when: impl FnOnce()) {
    let (_, mut disk) = disk();
    let mut mark = [0; SECTOR_SIZE];
    disk.read_blocks(5, &mut mark).expect("read the mark");
    if mark[0] == 0 {
        disk.write_blocks(5, &[1; SECTOR_SIZE]).expect("write the mark");
        disk.flush().expect("flush");
        say!("resetting");
        when();
        acpi::reset();
    }
    say!("second boot");
}
