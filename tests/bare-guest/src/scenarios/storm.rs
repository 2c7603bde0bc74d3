//! A disk in a storm: many requests at once, of which none may fail, get lost or come twice, and a
//! check of every block against what was last written there.
//!
//! The used ring is only looked at after an interrupt, so that one that gets lost is found out.

use alloc::boxed::Box;
use alloc::vec::Vec;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

use crate::dma::Identity;
use crate::machine::interrupts;
use crate::{pci, say};

/// Requests at once.
const DEPTH: usize = 32;
const BLOCK_BYTES: usize = 4096;
const SECTORS_PER_BLOCK: u64 = 8;
const VECTOR: u8 = 0x52;
/// How many requests are between two lines.
const LINE_EVERY: u32 = 500;

const READ: u32 = 0;
const WRITE: u32 = 1;
const OK: u8 = 0;

/// A request under way; the device holds pointers into it.
struct Slot {
    header: [u8; 16],
    data: [u8; BLOCK_BYTES],
    status: [u8; 1],
    token: u16,
    block: usize,
    /// What the block holds once the request is answered.
    generation: u32,
    is_write: bool,
}

/// The driver, the requests under way, and what every block holds.
struct Storm {
    transport: PciTransport,
    queue: VirtQueue<Identity, 128>,
    under_way: Vec<Box<Slot>>,
    spare: Vec<Box<Slot>>,
    /// Zero for a block that was never written.
    generations: Vec<u32>,
    random: u64,
    answered: u32,
    seen: u64,
}

/// Makes `count` requests with a line now and then, then reads every block.
pub fn run(count: u32) {
    let mut storm = Storm::start();
    while storm.answered < count {
        storm.fill();
        storm.wait();
    }
    while !storm.under_way.is_empty() {
        storm.wait();
    }
    for block in 0..storm.generations.len() {
        storm.submit(block, false);
        while !storm.under_way.is_empty() {
            storm.wait();
        }
    }
    say!("answered={}", storm.answered);
}

impl Storm {
    fn start() -> Self {
        let function = pci::find(DeviceType::Block, 0).expect("a block device");
        pci::enable(function);
        let mut transport = pci::transport(function);
        transport.set_status(DeviceStatus::empty());
        transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        // FLUSH, INDIRECT_DESC, EVENT_IDX, VERSION_1.
        let features = transport.read_device_features() & (1 << 9 | 1 << 28 | 1 << 29 | 1 << 32);
        assert_ne!(features & 1 << 29, 0, "the device knows event indexes");
        transport.write_driver_features(features);
        let status = transport.get_status() | DeviceStatus::FEATURES_OK;
        transport.set_status(status);
        pci::route_msix(function, 1, VECTOR);
        pci::set_queue_vector(function, 0, 1);
        let queue = VirtQueue::new(&mut transport, 0, false, true).expect("a queue of 128");
        transport.finish_init();
        // The low half: the disk is small.
        let sectors: u32 = transport.read_config_space(0).expect("the capacity");
        let blocks = (u64::from(sectors) / SECTORS_PER_BLOCK) as usize;
        let slot = || {
            Box::new(Slot {
                header: [0; 16],
                data: [0; BLOCK_BYTES],
                status: [0],
                token: 0,
                block: 0,
                generation: 0,
                is_write: false,
            })
        };
        Self {
            transport,
            queue,
            under_way: Vec::new(),
            spare: (0..DEPTH).map(|_| slot()).collect(),
            generations: alloc::vec![0; blocks],
            random: 0x9e37_79b9_7f4a_7c15,
            answered: 0,
            seen: 0,
        }
    }

    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// As many requests as there may be, each to a block that no other is for.
    fn fill(&mut self) {
        while !self.spare.is_empty() {
            let random = self.next_random();
            let block = (random >> 8) as usize % self.generations.len();
            if self.under_way.iter().any(|slot| slot.block == block) {
                continue;
            }
            self.submit(block, self.generations[block] == 0 || random & 1 == 0);
        }
    }

    fn submit(&mut self, block: usize, is_write: bool) {
        let mut slot = self.spare.pop().expect("a spare slot");
        slot.block = block;
        slot.is_write = is_write;
        slot.generation = self.generations[block] + u32::from(is_write);
        slot.header[..4].copy_from_slice(&(if is_write { WRITE } else { READ }).to_le_bytes());
        let sector = block as u64 * SECTORS_PER_BLOCK;
        slot.header[8..].copy_from_slice(&sector.to_le_bytes());
        slot.status = [0xff];
        let generation = slot.generation;
        let Slot { header, data, status, .. } = &mut *slot;
        // The slot stays where it is until the request is answered.
        let added = unsafe {
            if is_write {
                data.copy_from_slice(&pattern(block, generation));
                self.queue.add(&[header, data], &mut [status])
            } else {
                data.fill(0xee);
                self.queue.add(&[header], &mut [data, status])
            }
        };
        slot.token = added.expect("free descriptors");
        self.under_way.push(slot);
        if self.queue.should_notify() {
            self.transport.notify(0);
        }
    }

    /// Waits for an interrupt and takes what was answered by then.
    fn wait(&mut self) {
        while interrupts(VECTOR) == self.seen {
            core::hint::spin_loop();
        }
        self.seen = interrupts(VECTOR);
        while let Some(token) = self.queue.peek_used() {
            self.take(token);
        }
    }

    fn take(&mut self, token: u16) {
        let at = self.under_way.iter().position(|slot| slot.token == token);
        let at = at.unwrap_or_else(|| panic!("an answer to {token}, which was not asked"));
        let mut slot = self.under_way.swap_remove(at);
        let Slot { header, data, status, is_write, .. } = &mut *slot;
        let popped = unsafe {
            if *is_write {
                self.queue.pop_used(token, &[header, data], &mut [status])
            } else {
                self.queue.pop_used(token, &[header], &mut [data, status])
            }
        };
        popped.expect("the answer is the next");
        assert_eq!(slot.status, [OK], "block {} generation {}", slot.block, slot.generation);
        if !slot.is_write {
            let wanted = pattern(slot.block, slot.generation);
            let same = if slot.generation == 0 {
                slot.data.iter().all(|byte| *byte == 0)
            } else {
                slot.data == wanted
            };
            assert!(same, "block {} is not of generation {}", slot.block, slot.generation);
        }
        self.generations[slot.block] = slot.generation;
        self.spare.push(slot);
        self.answered += 1;
        if self.answered.is_multiple_of(LINE_EVERY) {
            say!("requests={}", self.answered);
        }
    }
}

fn pattern(block: usize, generation: u32) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    let seed = (block as u32).wrapping_mul(0x9e37_79b9) ^ generation.wrapping_mul(0x85eb_ca6b);
    for (index, word) in (0_u32..).zip(bytes.chunks_exact_mut(4)) {
        word.copy_from_slice(&seed.wrapping_add(index.wrapping_mul(0xc2b2_ae35)).to_le_bytes());
    }
    bytes
}
