//! A guest that numbers what it writes, and knows of each block which numbers may be there.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use backend_daemon::testing::{Buffer, DEADLINE, Driver, Options, Request};

use super::{DISK_BYTES, FLUSH, IN, OK, OUT, header, pattern};

const BLOCK_BYTES: u64 = 4096;
pub(crate) const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;

/// Numbers that look random, the same in every run of a seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        // Seeds that are close together begin far apart.
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) % sides
    }

    pub(crate) fn is_head(&mut self) -> bool {
        self.roll(2) == 0
    }
}

/// What the guest knows of one block. Versions are written one after the other: the next one is
/// on its way only when the one before was acknowledged.
#[derive(Clone, Copy, Default)]
struct Block {
    acknowledged: u64,
    submitted: u64,
}

#[derive(Clone, Copy)]
enum What {
    Write {
        block: u64,
    },
    /// Of what was acknowledged when it was submitted, or of a later version.
    Read {
        block: u64,
        at_least: u64,
    },
    Flush,
}

struct Pending {
    queue: u16,
    request: Request,
    what: What,
}

impl Pending {
    fn reads(&self, wanted: u64) -> bool {
        matches!(self.what, What::Read { block, .. } if block == wanted)
    }
}

/// The guest.
pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) dice: Dice,
    pub(crate) submitted: u64,
    pub(crate) answered: u64,
    options: Options,
    blocks: Vec<Block>,
    pending: Vec<Pending>,
}

/// A block's content: its number and its version, then bytes that follow from them.
fn content(block: u64, version: u64) -> Vec<u8> {
    let len_bytes = usize::try_from(BLOCK_BYTES).unwrap();
    if version == 0 {
        return vec![0; len_bytes];
    }
    let mut bytes = pattern(block << 32 | version, len_bytes);
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..16].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// Whether each byte is of one version or of the next one. A process that dies in the midst of a
/// write leaves such a block behind: its successor writes it again, and only then it is answered.
fn is_between(block: u64, bytes: &[u8], version: u64) -> bool {
    let (old, new) = (content(block, version), content(block, version + 1));
    bytes.iter().zip(old.iter().zip(&new)).all(|(byte, (old, new))| byte == old || byte == new)
}

/// Which version of a block this is; it has to be one whole.
fn version(block: u64, bytes: &[u8]) -> u64 {
    let version = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    assert!(bytes == content(block, version), "block {block} is torn or another one's");
    version
}

impl Guest {
    pub(crate) fn new(driver: Driver, options: Options, dice: Dice) -> Self {
        let blocks = vec![Block::default(); usize::try_from(BLOCKS).unwrap()];
        Self { driver, dice, submitted: 0, answered: 0, options, blocks, pending: Vec::new() }
    }

    fn block(&mut self, block: u64) -> &mut Block {
        &mut self.blocks[usize::try_from(block).unwrap()]
    }

    /// Fills the queues.
    pub(crate) fn submit(&mut self) {
        while self.pending.len() < usize::from(self.options.queue_size / 4) {
            let queue = u16::try_from(self.dice.roll(self.options.queues.into())).unwrap();
            let block = self.dice.roll(BLOCKS);
            let sector = block * BLOCK_BYTES / 512;
            let Block { acknowledged, submitted } = *self.block(block);
            // No disk promises a whole block to who reads it while it is written.
            let is_written = submitted != acknowledged;
            let is_read = self.pending.iter().any(|pending| pending.reads(block));
            let (what, request) = match self.dice.roll(8) {
                0 => {
                    let header = header(FLUSH, 0);
                    let request = self.driver.submit(queue, &[Buffer::Out(&header), Buffer::In(1)]);
                    (What::Flush, request)
                }
                1 | 2 if !is_written => {
                    let header = header(IN, sector);
                    let into = Buffer::In(u32::try_from(BLOCK_BYTES).unwrap());
                    let buffers = [Buffer::Out(&header), into, Buffer::In(1)];
                    let request = self.driver.submit(queue, &buffers);
                    (What::Read { block, at_least: acknowledged }, request)
                }
                _ if !is_written && !is_read => {
                    let (header, data) = (header(OUT, sector), content(block, submitted + 1));
                    let buffers = [Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)];
                    let request = self.driver.submit(queue, &buffers);
                    self.block(block).submitted += 1;
                    (What::Write { block }, request)
                }
                _ => continue,
            };
            self.pending.push(Pending { queue, request, what });
            self.submitted += 1;
        }
    }

    /// Takes what was answered; that nothing is answered twice, the driver sees to.
    pub(crate) fn collect(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            let Pending { queue, request, what } = pending;
            let Some(mut answer) = self.driver.wait_for(queue, request, Duration::ZERO) else {
                self.pending.push(pending);
                continue;
            };
            assert_eq!(answer.bytes.pop(), Some(OK));
            match what {
                What::Write { block } => self.block(block).acknowledged += 1,
                What::Read { block, at_least } => {
                    let version = version(block, &answer.bytes);
                    let most = self.block(block).submitted;
                    let is_known = (at_least..=most).contains(&version);
                    assert!(is_known, "block {block}: {version} is not in {at_least}..={most}");
                }
                What::Flush => {}
            }
            self.answered += 1;
        }
    }

    /// Goes on until something is answered.
    pub(crate) fn work(&mut self) {
        let (answered, deadline) = (self.answered, Instant::now() + DEADLINE);
        while self.answered == answered {
            assert!(Instant::now() < deadline, "nothing is answered any more");
            self.submit();
            self.collect();
        }
    }

    /// Waits for all answers.
    pub(crate) fn finish(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while !self.pending.is_empty() {
            assert!(Instant::now() < deadline, "{} requests are lost", self.pending.len());
            self.collect();
        }
        assert_eq!(self.submitted, self.answered);
        for queue in 0..self.options.queues {
            assert_eq!(self.driver.in_flight(queue), 0);
        }
    }

    /// How many requests the device has marked, and has not answered.
    pub(crate) fn marked(&self) -> usize {
        let region = self.driver.inflight_region();
        let part = region.len() / usize::from(self.options.queues);
        let entries = region.chunks_exact(part).flat_map(|part| part[16..].chunks_exact(16));
        entries.filter(|entry| entry[0] != 0).count()
    }

    /// Looks at the disk while nobody writes there: each block is what was acknowledged, and where
    /// a write is on its way, what that has left of it and has made of it.
    pub(crate) fn check(&self, disk: &File) {
        let mut found = vec![0; usize::try_from(BLOCK_BYTES).unwrap()];
        for (number, block) in (0..).zip(&self.blocks) {
            disk.read_exact_at(&mut found, number * BLOCK_BYTES).unwrap();
            let Block { acknowledged, submitted } = *block;
            if submitted != acknowledged && is_between(number, &found, acknowledged) {
                continue;
            }
            let version = version(number, &found);
            let is_known = (acknowledged..=submitted).contains(&version);
            assert!(is_known, "block {number}: {version} is not in {acknowledged}..={submitted}");
        }
    }
}
