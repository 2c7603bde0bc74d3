//! A split virtqueue from the driver's side (virtio 1.3, section 2.7).

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::memory::{GuestMemory, QUEUE_STRIDE};
use super::sys::borrow;
use super::{Answer, Buffer, Options};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A request that was made available.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request(u64);

/// What a broken or hostile driver may make available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// A buffer at an address where no memory is.
    OutsideMemory,
    /// A buffer that starts in memory and ends outside.
    AcrossTheEnd,
    /// A descriptor that is its own successor.
    Loop,
    /// A buffer for the device to read, behind one for it to write.
    ReadableAfterWritable,
    /// A successor outside the descriptor table.
    NextOutsideTable,
    /// A head outside the descriptor table.
    HeadOutsideTable,
    /// An indirect table where no memory is.
    IndirectOutsideMemory,
    /// An available index further on than the queue is long.
    IndexTooFar,
}

impl Malformed {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::OutsideMemory,
        Self::AcrossTheEnd,
        Self::Loop,
        Self::ReadableAfterWritable,
        Self::NextOutsideTable,
        Self::HeadOutsideTable,
        Self::IndirectOutsideMemory,
        Self::IndexTooFar,
    ];
}

/// One descriptor, but for its successor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    address: u64,
    len_bytes: u32,
    flags: u16,
}

impl Descriptor {
    pub(super) fn new(address: u64, len_bytes: u32, writable: bool) -> Self {
        Self { address, len_bytes, flags: if writable { WRITE } else { 0 } }
    }

    /// One that stands for a whole chain, which is written into memory of its own.
    pub(super) fn indirect(memory: &mut GuestMemory, chain: &[Self]) -> Self {
        let len_bytes = u32::try_from(16 * chain.len()).unwrap();
        let address = memory.allocate(len_bytes.into());
        let places: Vec<u16> = (0..u16::try_from(chain.len()).unwrap()).collect();
        write_chain(memory, address, chain, &places);
        Self { address, len_bytes, flags: INDIRECT }
    }

    /// Writes it, without a successor, into a place of a table.
    pub(super) fn write(self, memory: &GuestMemory, table: u64, place: u16) {
        write_descriptor(memory, table, place, (self.address, self.len_bytes, self.flags, 0));
    }
}

struct Pending {
    request: Request,
    descriptors: Vec<u16>,
    buffers: Vec<(u64, u32)>,
    answers: Vec<(u64, u32)>,
}

pub(super) struct GuestQueue {
    pub(super) index: u16,
    pub(super) size: u16,
    pub(super) event_idx: bool,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) err: EventFd,
    /// The used ring lies where the available one does: see `flood`.
    pub(super) rings_are_one: bool,
    free: Vec<u16>,
    avail_index: u16,
    used_seen: u16,
    next_request: u64,
    pending: HashMap<u16, Pending>,
    answers: HashMap<Request, Answer>,
}

impl GuestQueue {
    pub(super) fn new(index: u16, options: &Options) -> Self {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        Self {
            index,
            size: options.queue_size,
            event_idx: false,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            rings_are_one: false,
            free: (0..options.queue_size).rev().collect(),
            avail_index: 0,
            used_seen: 0,
            next_request: 0,
            pending: HashMap::new(),
            answers: HashMap::new(),
        }
    }

    pub(super) fn descriptors(&self) -> u64 {
        QUEUE_STRIDE * (u64::from(self.index) + 1)
    }

    pub(super) fn avail(&self) -> u64 {
        self.descriptors() + 16 * u64::from(self.size)
    }

    pub(super) fn used(&self) -> u64 {
        if self.rings_are_one {
            return self.avail();
        }
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// Makes a request of these buffers available.
    pub(super) fn offer(
        &mut self,
        memory: &mut GuestMemory,
        buffers: &[Buffer<'_>],
        indirect: bool,
    ) -> Request {
        let mut chain = Vec::new();
        let (mut taken, mut answers) = (Vec::new(), Vec::new());
        for buffer in buffers {
            let len_bytes = match buffer {
                Buffer::Out(bytes) => u32::try_from(bytes.len()).unwrap(),
                Buffer::In(len_bytes) => *len_bytes,
            };
            let address = memory.allocate(len_bytes.into());
            taken.push((address, len_bytes));
            match buffer {
                Buffer::Out(bytes) => memory.write_bytes(address, bytes),
                Buffer::In(_) => {
                    // The device has to write all that is read back.
                    memory.write_bytes(address, &vec![0xaa; len_bytes as usize]);
                    answers.push((address, len_bytes));
                }
            }
            let writable = matches!(buffer, Buffer::In(_));
            chain.push(Descriptor::new(address, len_bytes, writable));
        }
        if indirect {
            let table = Descriptor::indirect(memory, &chain);
            taken.push((table.address, table.len_bytes));
            chain = vec![table];
        }
        let request = self.offer_chain(memory, &chain);
        let pending = self.pending.values_mut().find(|pending| pending.request == request);
        let pending = pending.expect("it was just made available");
        (pending.buffers, pending.answers) = (taken, answers);
        request
    }

    /// Makes a chain of exactly these descriptors available.
    pub(super) fn offer_chain(
        &mut self,
        memory: &mut GuestMemory,
        chain: &[Descriptor],
    ) -> Request {
        self.collect(memory);
        assert!(self.free.len() >= chain.len(), "queue {} is full", self.index);
        let descriptors = self.free.split_off(self.free.len() - chain.len());
        write_chain(memory, self.descriptors(), chain, &descriptors);
        let request = Request(self.next_request);
        self.next_request += 1;
        let head = descriptors[0];
        let pending = Pending { request, descriptors, buffers: Vec::new(), answers: Vec::new() };
        self.pending.insert(head, pending);
        self.publish(memory, head);
        request
    }

    fn publish(&mut self, memory: &GuestMemory, head: u16) {
        let slot = u64::from(self.avail_index % self.size);
        memory.write(self.avail() + 4 + 2 * slot, head.to_le());
        self.avail_index = self.avail_index.wrapping_add(1);
        fence(Ordering::SeqCst);
        memory.write(self.avail() + 2, self.avail_index.to_le());
        fence(Ordering::SeqCst);
    }

    pub(super) fn offer_malformed(&mut self, memory: &mut GuestMemory, what: Malformed) {
        let table = self.descriptors();
        let page = memory.allocate(4096);
        let head = self.free.pop().expect("the queue is not full");
        let mut other = self.free.pop().expect("the queue is not full");
        let outside = 1 << 60;
        let mut first = (page, 16_u32, NEXT, other);
        let mut second = (page, 16_u32, 0, 0);
        match what {
            Malformed::OutsideMemory => second.0 = outside,
            Malformed::AcrossTheEnd => second.1 = u32::MAX,
            Malformed::Loop => {
                second.2 = NEXT;
                second.3 = other;
            }
            Malformed::ReadableAfterWritable => first.2 = NEXT | WRITE,
            Malformed::NextOutsideTable => {
                first.3 = self.size;
                other = head;
            }
            Malformed::HeadOutsideTable | Malformed::IndexTooFar => {}
            Malformed::IndirectOutsideMemory => first = (outside, 32, INDIRECT, 0),
        }
        if other != head {
            write_descriptor(memory, table, other, second);
        }
        write_descriptor(memory, table, head, first);
        match what {
            Malformed::HeadOutsideTable => self.publish(memory, self.size),
            Malformed::IndexTooFar => {
                self.avail_index = self.avail_index.wrapping_add(self.size + 1);
                memory.write(self.avail() + 2, self.avail_index.to_le());
            }
            _ => self.publish(memory, head),
        }
    }

    /// Takes what the device has used.
    pub(super) fn collect(&mut self, memory: &mut GuestMemory) {
        let used = self.used_index(memory);
        fence(Ordering::SeqCst);
        while self.used_seen != used {
            let entry = self.used() + 4 + 8 * u64::from(self.used_seen % self.size);
            let head = u32::from_le(memory.read(entry));
            let written_bytes = u32::from_le(memory.read(entry + 4));
            self.used_seen = self.used_seen.wrapping_add(1);
            let head = u16::try_from(head).expect("the device gives back a head");
            let pending = self.pending.remove(&head);
            let pending = pending.expect("the device gives back each chain once");
            let bytes = pending
                .answers
                .iter()
                .flat_map(|(address, len_bytes)| memory.read_bytes(*address, *len_bytes))
                .collect();
            for (address, len_bytes) in pending.buffers {
                memory.release(address, len_bytes.into());
            }
            self.free.extend(pending.descriptors);
            self.answers.insert(pending.request, Answer { written_bytes, bytes });
        }
    }

    pub(super) fn take(&mut self, request: Request) -> Option<Answer> {
        self.answers.remove(&request)
    }

    /// The head of an unanswered request.
    pub(super) fn head(&self, request: Request) -> u16 {
        let mut pending = self.pending.iter();
        let found = pending.find(|(_head, pending)| pending.request == request);
        *found.expect("the request has no answer yet").0
    }

    pub(super) fn in_flight(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn used_index(&self, memory: &GuestMemory) -> u16 {
        u16::from_le(memory.read(self.used() + 2))
    }

    pub(super) fn wants_kick(&self, memory: &GuestMemory) -> bool {
        if self.event_idx {
            let event = self.used() + 4 + 8 * u64::from(self.size);
            let event = u16::from_le(memory.read(event));
            return self.avail_index.wrapping_sub(event).wrapping_sub(1) < 1;
        }
        u16::from_le(memory.read(self.used())) & 1 == 0
    }

    /// Waits for an interrupt; gives false at the deadline. The used index decides whether
    /// anything happened, but only an interrupt wakes: one that is missing fails the test.
    pub(super) fn wait_for_interrupt(&mut self, memory: &GuestMemory, until: Instant) -> bool {
        if self.event_idx {
            // Ask for an interrupt at the next used entry (virtio 1.3, section 2.7.7.1).
            memory.write(self.avail() + 4 + 2 * u64::from(self.size), self.used_seen.to_le());
            fence(Ordering::SeqCst);
            if self.used_index(memory) != self.used_seen {
                return true;
            }
        }
        wait_readable(&self.call, until)
    }

    pub(super) fn wait_for_error(&mut self, until: Instant) -> bool {
        wait_readable(&self.err, until)
    }

    /// Forgets everything, and empties the rings.
    pub(super) fn clear(&mut self, memory: &mut GuestMemory) {
        let bytes =
            usize::try_from(self.used() + 6 + 8 * u64::from(self.size) - self.descriptors());
        memory.write_bytes(self.descriptors(), &vec![0; bytes.unwrap()]);
        for (_head, pending) in self.pending.drain() {
            for (address, len_bytes) in pending.buffers {
                memory.release(address, len_bytes.into());
            }
        }
        self.rings_are_one = false;
        self.free = (0..self.size).rev().collect();
        (self.avail_index, self.used_seen) = (0, 0);
        for stale in [&self.kick, &self.call, &self.err] {
            match stale.read() {
                Ok(_) | Err(_) => {}
            }
        }
    }
}

fn write_chain(memory: &GuestMemory, table: u64, chain: &[Descriptor], places: &[u16]) {
    for (position, descriptor) in chain.iter().enumerate() {
        let next = places.get(position + 1).copied();
        let flags = descriptor.flags | if next.is_some() { NEXT } else { 0 };
        let raw = (descriptor.address, descriptor.len_bytes, flags, next.unwrap_or(0));
        write_descriptor(memory, table, places[position], raw);
    }
}

fn write_descriptor(memory: &GuestMemory, table: u64, place: u16, raw: (u64, u32, u16, u16)) {
    let at = table + 16 * u64::from(place);
    let (address, len_bytes, flags, next) = raw;
    memory.write(at, address.to_le());
    memory.write(at + 8, len_bytes.to_le());
    memory.write(at + 12, flags.to_le());
    memory.write(at + 14, next.to_le());
}

fn wait_readable(eventfd: &EventFd, until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).unwrap();
    let mut fds = [PollFd::from_borrowed_fd(borrow(eventfd), PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).unwrap() > 0 && eventfd.read().is_ok()
}
