//! A virtqueue as a device sees it: take chains, give them back, and nothing else.
//!
//! A chain is checked whole when it is taken: every descriptor inside the guest's memory, readable
//! ones before writable ones, properly ended. A device therefore never meets a bad address. The
//! guest may rewrite its descriptors afterwards; nobody looks at them again.

mod announce;
mod dirty;
mod gather;
mod together;
mod tracking;

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};

pub use self::gather::{readv, skip, take, total, writev};
pub(crate) use self::tracking::Stand;
use crate::dirty::DirtyLog;
use crate::doorbell::Doorbell;
use crate::inflight::Log;
pub use crate::sys::Segment;

/// The most descriptors of one chain. An indirect table may hold 65535, and each costs this
/// process memory as long as the request is in flight; no driver uses more than these, which is
/// what QEMU allows too. (The ring's own size is no limit: Linux has longer indirect tables.)
const MAX_DESCRIPTORS: usize = 1024;

/// The guest's memory as the frontend last told it.
pub type Memory = GuestMemoryMmap<()>;
/// A handle on the current memory, exchanged whole when the frontend changes the table.
pub type SharedMemory = GuestMemoryAtomic<Memory>;
/// The memory as it was when it was loaded; keeps its mappings alive.
pub type MemoryGuard = GuestMemoryLoadGuard<Memory>;

/// What a guest can get wrong about a ring.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The ring's own areas or indices are impossible.
    #[error("virtqueue")]
    Queue(#[from] virtio_queue::Error),
    /// A descriptor points outside the guest's memory.
    #[error("descriptor of {len_bytes} bytes at {address:#x} lies outside the guest's memory")]
    Address {
        /// Guest-physical address.
        address: u64,
        /// The descriptor's length.
        len_bytes: u32,
    },
    /// A readable descriptor follows a writable one (virtio 1.3, section 2.7.4.2).
    #[error("a readable descriptor follows a writable one in chain {head}")]
    Order {
        /// The chain's head.
        head: u16,
    },
    /// The chain loops, leaves its table, or has more descriptors than the queue.
    #[error("chain {head} does not end")]
    Endless {
        /// The chain's head.
        head: u16,
    },
    /// The device wants to write more than the chain holds: a guest's mistake in one request.
    #[error("{wanted} bytes do not fit into {available} of the chain")]
    TooShort {
        /// What was to be read or written, in bytes, from the part's start.
        wanted: u64,
        /// What there is.
        available: u64,
    },
    /// A chain that was in flight before can't be looked up again.
    #[error("no memory to look a chain up")]
    NoMemory,
}

/// One running virtqueue, owned by its worker.
pub struct Ring {
    queue: Queue,
    pub(crate) memory: MemoryGuard,
    pub(crate) call: Option<Arc<Doorbell>>,
    /// The used index up to which the guest was interrupted, or did not want to be.
    announced: u16,
    /// The next announcement is made even if nothing was pushed: an earlier one may have reached
    /// nobody, and with `EVENT_IDX` a guest that waits for it gets no other.
    owes_interrupt: bool,
    /// The guest broke it: it stops at the end of the worker's call.
    broken: bool,
    /// Where chains in flight are marked, if the frontend keeps a region for it.
    log: Option<Log>,
    /// Where written pages are logged, while the frontend wants to know.
    dirty: Option<DirtyLog>,
}

/// One request: a chain of descriptors that the guest made available, checked and taken.
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    descriptors: DescriptorChain<MemoryGuard>,
    /// What the buffers lie in.
    memory: MemoryGuard,
    is_repeated: bool,
}

impl Ring {
    /// A ring on a `queue` whose areas lie in `memory`.
    pub(crate) fn new(queue: Queue, memory: MemoryGuard, call: Option<Arc<Doorbell>>) -> Self {
        let (announced, owes_interrupt, broken) = (queue.next_used(), true, false);
        Self { queue, memory, call, announced, owes_interrupt, broken, log: None, dirty: None }
    }

    /// The position of the next chain that `pop` takes: what a restart goes on from.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// The number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The guest's memory that the ring lies in.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Takes the next available chain. Before `None` is returned the guest's next kick is armed,
    /// so a worker that pops until `None` misses nothing; one that stops earlier has to come back
    /// by itself.
    ///
    /// # Errors
    ///
    /// Fails if the guest broke the ring: the queue is then stopped.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let popped = self.look();
        self.broken |= popped.is_err();
        popped
    }

    fn look(&mut self) -> Result<Option<Chain>, RingError> {
        if let Some(chain) = self.take()? {
            return Ok(Some(chain));
        }
        // The guest may add a chain between the last look and the request for a kick (virtio
        // 1.3, section 2.7.10): look again after having asked.
        let missed = self.queue.enable_notification(&*self.memory)?;
        self.log_used_ring();
        if !missed {
            return Ok(None);
        }
        self.queue.disable_notification(&*self.memory)?;
        self.log_used_ring();
        self.take()
    }

    fn take(&mut self) -> Result<Option<Chain>, RingError> {
        if let Some(chain) = self.take_left()? {
            return Ok(Some(chain));
        }
        let avail = self.queue.avail_idx(&*self.memory, Ordering::Acquire)?;
        let waiting = (avail - Wrapping(self.queue.next_avail())).0;
        if waiting > self.queue.size() {
            return Err(virtio_queue::Error::InvalidAvailRingIndex.into());
        }
        let descriptors = self.queue.iter(self.memory.clone())?.next();
        let Some(descriptors) = descriptors else { return Ok(None) };
        let chain = Chain::check(descriptors, self.memory.clone())?;
        if let Some(log) = &mut self.log {
            log.mark(chain.head);
        }
        Ok(Some(chain))
    }

    /// Puts back the chain that was popped last, as if it had never been taken.
    #[expect(clippy::needless_pass_by_value, reason = "a chain put back can't be used again")]
    pub fn unpop(&mut self, chain: Chain) {
        match &mut self.log {
            Some(log) if chain.is_repeated => return log.wait_again(chain.head),
            Some(log) => log.unmark(chain.head),
            None => {}
        }
        self.queue.go_to_previous_position();
    }

    /// Whether chains in flight are marked where a successor finds them.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        self.log.is_some()
    }

    /// Gives a chain back; the device wrote `written_bytes` bytes into it. The guest is told at
    /// the end of the worker's call.
    ///
    /// # Errors
    ///
    /// Fails if the used ring lies outside the guest's memory.
    #[expect(clippy::needless_pass_by_value, reason = "a chain given back can't be used again")]
    pub fn push(&mut self, chain: Chain, written_bytes: u32) -> Result<(), RingError> {
        self.log_chain(&chain);
        if let Some(log) = &self.log {
            log.link(chain.head);
        }
        self.publish(&[chain.head], written_bytes)
    }

    /// Writes the last of `heads` into the used ring and stores the index, behind all of them.
    fn publish(&mut self, heads: &[u16], written_bytes: u32) -> Result<(), RingError> {
        let Some(last) = heads.last() else { return Ok(()) };
        let added = self.queue.add_used(&*self.memory, *last, written_bytes);
        self.log_used_ring();
        self.broken |= added.is_err();
        if added.is_ok()
            && let Some(log) = &self.log
        {
            log.settle(heads.iter().copied(), self.queue.next_used());
        }
        Ok(added?)
    }
}

impl Chain {
    /// Looks at each descriptor; the buffers have to lie in `memory`.
    fn check(
        descriptors: DescriptorChain<MemoryGuard>,
        memory: MemoryGuard,
    ) -> Result<Self, RingError> {
        let head = descriptors.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut ended = false;
        for (count, descriptor) in descriptors.clone().enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(RingError::Endless { head });
            }
            let part = if descriptor.is_write_only() {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(RingError::Order { head });
            };
            segments(&memory, descriptor.addr().0, descriptor.len(), part)?;
            ended = !descriptor.has_next();
        }
        if !ended {
            return Err(RingError::Endless { head });
        }
        Ok(Self { head, readable, writable, descriptors, memory, is_repeated: false })
    }

    /// The index of the chain's first descriptor, which names the request until it is pushed.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the guest wrote for the device, in its order.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Where the device answers, in the guest's order.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// The length of the readable part, in bytes.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    /// The length of the writable part, in bytes.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }

    /// The guest's memory that the chain lies in.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether a predecessor of this process had taken the chain, and may have acted on it.
    #[must_use]
    pub fn is_repeated(&self) -> bool {
        self.is_repeated
    }

    /// The chain as `virtio_queue` knows it, for libraries that walk it themselves.
    #[must_use]
    pub fn descriptor_chain(&self) -> DescriptorChain<MemoryGuard> {
        self.descriptors.clone()
    }

    /// Copies `bytes.len()` bytes out of the readable part, from its byte `offset` on.
    ///
    /// # Errors
    ///
    /// Fails if the part is too short; nothing useful is in `bytes` then.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), RingError> {
        let wanted = offset + bytes.len() as u64;
        let available = self.readable_len();
        if wanted > available {
            return Err(RingError::TooShort { wanted, available });
        }
        let mut done = 0;
        for segment in skip(&self.readable, offset) {
            if done == bytes.len() {
                break;
            }
            done += segment.copy_to(&mut bytes[done..]);
        }
        Ok(())
    }

    /// Copies `bytes` into the writable part, from its byte `offset` on.
    ///
    /// # Errors
    ///
    /// Fails if the part is too short; nothing is written then.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), RingError> {
        let wanted = offset + bytes.len() as u64;
        let available = self.writable_len();
        if wanted > available {
            return Err(RingError::TooShort { wanted, available });
        }
        let mut done = 0;
        for segment in skip(&self.writable, offset) {
            if done == bytes.len() {
                break;
            }
            done += segment.copy_from(&bytes[done..]);
        }
        Ok(())
    }
}

fn segments(
    memory: &Memory,
    address: u64,
    len_bytes: u32,
    into: &mut Vec<Segment>,
) -> Result<(), RingError> {
    for slice in memory.get_slices(GuestAddress(address), len_bytes as usize) {
        let slice = slice.map_err(|_error| RingError::Address { address, len_bytes })?;
        into.push(Segment::new(&slice));
    }
    Ok(())
}
