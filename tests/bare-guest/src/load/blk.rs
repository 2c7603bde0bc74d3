//! Writes and reads of a disk, several at a time. A block holds its number and the number of the
//! write that was acknowledged last, all over.

use alloc::boxed::Box;
use alloc::vec::Vec;

use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

use super::{Dice, Watch, wait_for_order};
use crate::dma::Identity;
use crate::{pci, say};

type Disk = VirtIOBlk<Identity, PciTransport>;

const BLOCK_BYTES: usize = 4096;
const SECTORS: usize = BLOCK_BYTES / 512;
const BLOCKS: usize = 64;
const DEPTH: usize = 8;
const ENOUGH_ERRORS: u64 = 100;

/// Memory for one request. It stays where it is while the device has it.
struct Slot {
    request: BlkReq,
    response: BlkResp,
    data: Box<[u8; BLOCK_BYTES]>,
    pending: Option<Pending>,
}

#[derive(Clone, Copy)]
struct Pending {
    token: u16,
    block: usize,
    /// What is written, or none of a read.
    version: Option<u64>,
}

struct Load {
    disk: Disk,
    slots: Vec<Slot>,
    acknowledged: [u64; BLOCKS],
    dice: Dice,
    watch: Watch,
}

/// Goes on until the host has enough; then looks at every block once more.
pub fn run() {
    let mut load = Load::start();
    while !load.watch.is_over() {
        load.submit();
        load.collect();
    }
    load.drain();
    for block in 0..BLOCKS {
        let mut data = [0; BLOCK_BYTES];
        load.disk.read_blocks(block * SECTORS, &mut data).expect("a read at the end");
        load.check(block, &data);
    }
    load.watch.report();
}

/// Goes on until many requests have failed, and every other one is answered too.
pub fn until_it_fails() {
    let mut load = Load::start();
    while load.watch.tally.errors < ENOUGH_ERRORS {
        load.submit();
        load.collect();
    }
    load.drain();
    say!("errors={}", load.watch.tally.errors);
}

/// Writes a block and reads the one before it, then waits for an order with nothing outstanding.
pub fn in_steps() {
    let mut load = Load::start();
    let (mut old, mut new) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
    for block in 1..BLOCKS {
        fill(&mut new, block, 1);
        load.disk.write_blocks(block * SECTORS, &new).expect("a write");
        load.disk.read_blocks((block - 1) * SECTORS, &mut old).expect("a read");
        load.check(block - 1, &old);
        assert_eq!(load.watch.tally.lost, 0, "block {block}");
        load.acknowledged[block] = 1;
        say!("step {block}");
        if wait_for_order() == b'q' {
            break;
        }
    }
}

fn fill(data: &mut [u8; BLOCK_BYTES], block: usize, version: u64) {
    let word = (block as u64) << 48 | version;
    for bytes in data.chunks_exact_mut(8) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

impl Slot {
    fn new() -> Self {
        Self {
            request: BlkReq::default(),
            response: BlkResp::default(),
            data: Box::new([0; BLOCK_BYTES]),
            pending: None,
        }
    }
}

impl Load {
    fn start() -> Self {
        let function = pci::find(DeviceType::Block, 0).expect("a block device");
        pci::enable(function);
        Self {
            disk: Disk::new(pci::transport(function)).expect("the driver starts"),
            slots: (0..DEPTH).map(|_slot| Slot::new()).collect(),
            acknowledged: [0; BLOCKS],
            dice: Dice::new(),
            watch: Watch::start(),
        }
    }

    /// Waits for the answers that are missing.
    fn drain(&mut self) {
        while self.slots.iter().any(|slot| slot.pending.is_some()) {
            self.collect();
        }
    }

    fn submit(&mut self) {
        for at in 0..self.slots.len() {
            if self.slots[at].pending.is_some() {
                continue;
            }
            // One request to a block at a time: their order is nobody's promise.
            let block = self.dice.roll(BLOCKS);
            if self.slots.iter().any(|slot| slot.pending.is_some_and(|it| it.block == block)) {
                continue;
            }
            let version = (self.dice.roll(4) != 0).then_some(self.acknowledged[block] + 1);
            let Slot { request, response, data, pending } = &mut self.slots[at];
            // The slot outlives the request and is left alone until it is answered.
            let token = match version {
                Some(version) => {
                    fill(data, block, version);
                    let from = block * SECTORS;
                    unsafe { self.disk.write_blocks_nb(from, request, &data[..], response) }
                }
                None => unsafe {
                    let into = &mut data[..];
                    self.disk.read_blocks_nb(block * SECTORS, request, into, response)
                },
            };
            let token = token.expect("room in the queue");
            *pending = Some(Pending { token, block, version });
        }
    }

    fn collect(&mut self) {
        let Some(token) = self.disk.peek_used() else {
            core::hint::spin_loop();
            return;
        };
        let of = |slot: &Slot| slot.pending.is_some_and(|pending| pending.token == token);
        let Some(at) = self.slots.iter().position(of) else {
            // The driver can't take it back either: nothing is right from here on.
            self.watch.tally.repeated += 1;
            self.watch.report();
            panic!("request {token} is answered and was not asked");
        };
        let Slot { request, response, data, pending } = &mut self.slots[at];
        let Pending { block, version, .. } = pending.take().expect("it was found by it");
        // These are the buffers that the request was made with.
        let ended = match version {
            Some(_) => unsafe {
                self.disk.complete_write_blocks(token, request, &data[..], response)
            },
            None => unsafe {
                self.disk.complete_read_blocks(token, request, &mut data[..], response)
            },
        };
        self.watch.completed();
        match (ended, version) {
            (Ok(()), Some(version)) => self.acknowledged[block] = version,
            (Ok(()), None) => {
                let data = self.slots[at].data.clone();
                self.check(block, &data);
            }
            (Err(error), _) => {
                self.watch.tally.errors += 1;
                say!("block {block}: {error}");
            }
        }
    }

    /// A block is what was acknowledged last: what is older was lost, or came once more.
    fn check(&mut self, block: usize, data: &[u8; BLOCK_BYTES]) {
        let mut right = [0; BLOCK_BYTES];
        if self.acknowledged[block] != 0 {
            fill(&mut right, block, self.acknowledged[block]);
        }
        if *data != right {
            self.watch.tally.lost += 1;
            say!("block {block} is not at {}: {:?}", self.acknowledged[block], &data[..8]);
        }
    }
}
