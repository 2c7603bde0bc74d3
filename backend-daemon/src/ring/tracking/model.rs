//! A guest, a device that dies at any step, and a successor: each chain comes back exactly once.

use std::collections::{HashSet, VecDeque};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::VhostUserInflight;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::inflight::fault::{seen, survive};
use crate::inflight::{Region, Step, make};
use crate::ring::{Chain, Memory, MemoryGuard, Ring, SharedMemory};

const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

/// Numbers that look random, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        u32::try_from(self.0 >> 33).unwrap() % sides
    }
}

/// A driver, and what it knows: which requests it has made and not got back, oldest first.
struct Guest {
    memory: MemoryGuard,
    region: Region,
    free: Vec<u16>,
    pending: Vec<u16>,
    avail: u16,
    used: u16,
    returned: u32,
}

impl Guest {
    /// `start` is where both indices begin, so that they wrap around soon.
    fn new(start: u16) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let memory = SharedMemory::new(memory).memory();
        let (info, file) = make(&VhostUserInflight::new(0, 0, 1, SIZE), 1, SIZE).unwrap();
        let region = Region::adopt(&info, file, 1).unwrap();
        let guest = Self {
            memory,
            region,
            free: (0..SIZE).collect(),
            pending: Vec::new(),
            avail: start,
            used: start,
            returned: 0,
        };
        guest.put(AVAIL + 2, start);
        guest.put(USED + 2, start);
        guest
    }

    fn put(&self, at: u64, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(at), Ordering::Release).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(at), Ordering::Acquire).unwrap())
    }

    fn offer(&mut self, dice: &mut Dice) {
        if self.free.is_empty() {
            return;
        }
        let which = dice.roll(u32::try_from(self.free.len()).unwrap());
        let head = self.free.swap_remove(which as usize);
        // One device-writable buffer, which names its head.
        let descriptor = GuestAddress(DESCRIPTORS + 16 * u64::from(head));
        let buffer = BUFFERS + 16 * u64::from(head);
        let word = 16_u64 | 2 << 32;
        self.memory.write_obj([buffer.to_le(), word.to_le()], descriptor).unwrap();
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), head);
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, self.avail);
        self.pending.push(head);
    }

    fn collect(&mut self) {
        while self.used != self.get(USED + 2) {
            let head = self.get(USED + 4 + 8 * u64::from(self.used % SIZE));
            let place = self.pending.iter().position(|pending| *pending == head);
            self.pending.remove(place.expect("the device gives back each chain once"));
            self.free.push(head);
            self.used = self.used.wrapping_add(1);
            self.returned += 1;
        }
    }

    /// A device's ring as a session makes it; `base` is what the frontend believes.
    fn ring(&self, base: u16) -> Ring {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_next_avail(base);
        queue.set_next_used(self.get(USED + 2));
        queue.set_ready(true);
        let log = self.region.log(0, SIZE).unwrap().unwrap();
        Ring::new(queue, self.memory.clone(), None).track(log)
    }
}

/// A device's life: it takes and answers, in any order, until it dies or is told to stop.
fn live(guest: &mut Guest, base: u16, dice: &mut Dice) {
    let mut ring = guest.ring(base);
    // Chains come in the order in which the guest made them available, whoever took them first.
    guest.collect();
    let mut expected: VecDeque<u16> = guest.pending.iter().copied().collect();
    let mut held: Vec<Chain> = Vec::new();
    for _ in 0..40 {
        match dice.roll(8) {
            0..=2 => {
                let before = guest.pending.len();
                guest.offer(dice);
                expected.extend(guest.pending[before..].iter());
            }
            3 | 4 => take(&mut ring, &mut held, &mut expected),
            5 => {
                let before = held.len();
                take(&mut ring, &mut held, &mut expected);
                if held.len() > before
                    && let Some(chain) = held.pop()
                {
                    expected.push_front(chain.head());
                    ring.unpop(chain);
                }
            }
            6 if !held.is_empty() => {
                let which = dice.roll(u32::try_from(held.len()).unwrap());
                ring.push(held.remove(which as usize), 1).unwrap();
            }
            _ => {
                let count = dice.roll(u32::try_from(held.len()).unwrap() + 1);
                let batch: Vec<_> = held.drain(..count as usize).map(|it| (it, 2)).collect();
                ring.push_together(batch).unwrap();
            }
        }
        guest.collect();
    }
    for chain in held {
        ring.push(chain, 3).unwrap();
    }
    let stand = ring.give_up();
    guest.collect();
    if stand.is_whole {
        assert_eq!(stand.base, guest.get(USED + 2), "nothing is in flight after a drain");
        guest.region.wipe(0);
    }
}

fn take(ring: &mut Ring, held: &mut Vec<Chain>, expected: &mut VecDeque<u16>) {
    let chain = ring.pop().unwrap();
    assert_eq!(chain.as_ref().map(Chain::head), expected.pop_front());
    if let Some(chain) = chain {
        let segment = chain.writable().first().expect("a request has one buffer");
        assert_eq!((segment.len(), chain.descriptor_chain().count()), (16, 1));
        held.push(chain);
    }
}

#[test]
fn a_region_full_of_lies_costs_requests_and_nothing_else() {
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let mut guest = Guest::new(0);
        let (info, file) = make(&VhostUserInflight::new(0, 0, 1, SIZE), 1, SIZE).unwrap();
        let mut bytes: Vec<u8> =
            (0..info.mmap_size).map(|_at| u8::try_from(dice.roll(256)).unwrap()).collect();
        bytes[..8].fill(0);
        bytes[8..12].copy_from_slice(&[1_u16.to_ne_bytes(), SIZE.to_ne_bytes()].concat());
        if dice.roll(2) == 0 {
            // A batch of a plausible size, which begins anywhere.
            bytes[14..16].copy_from_slice(&(0_u16.wrapping_sub(SIZE - 1)).to_ne_bytes());
        }
        file.write_all_at(&bytes, 0).unwrap();
        guest.region = Region::adopt(&info, file, 1).unwrap();
        (0..SIZE).for_each(|_| guest.offer(&mut dice));
        let mut ring = guest.ring(0);
        for _ in 0..40 {
            match ring.pop() {
                Ok(Some(chain)) if dice.roll(4) == 0 => ring.unpop(chain),
                Ok(Some(chain)) => ring.push(chain, 0).unwrap(),
                Ok(None) | Err(_) => {}
            }
        }
        ring.give_up();
    }
}

#[test]
fn whenever_a_device_dies_each_chain_comes_back_once_and_in_order() {
    let mut deaths: HashSet<Step> = HashSet::new();
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let mut guest = Guest::new(u16::MAX - 20);
        let mut base = guest.used;
        for _ in 0..20 {
            let steps = dice.roll(120);
            if let Err(step) = survive(steps, || live(&mut guest, base, &mut dice)) {
                deaths.insert(step);
            }
            // What a frontend reads after a death is what it gets after a drain.
            base = guest.get(USED + 2);
        }
        // A last successor, which lives.
        let mut ring = guest.ring(base);
        while let Some(chain) = ring.pop().unwrap() {
            ring.push(chain, 0).unwrap();
        }
        guest.collect();
        assert!(guest.pending.is_empty(), "seed {seed}: {:?} are lost", guest.pending);
        assert!(guest.returned > 0);
    }
    assert_eq!(deaths, seen(), "each step was died at");
    assert_eq!(deaths.len(), 11, "{deaths:?}");
}
