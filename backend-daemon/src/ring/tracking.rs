//! A ring whose chains in flight are marked in a region that outlives the process.
//!
//! What a predecessor left in flight comes before anything new from the available ring, in the
//! order in which it was taken.

#[cfg(test)]
mod model;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestRegionMmap, MmapRegion};

use super::{Chain, MemoryGuard, Ring, RingError, SharedMemory};
use crate::inflight::Log;

const PAGE_BYTES: u64 = 4096;

/// Where a ring stood when it was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stand {
    /// The position of the next chain.
    pub(crate) base: u16,
    /// Whether the base says everything: nothing waits in the region to be served before it.
    pub(crate) is_whole: bool,
}

impl Ring {
    /// Marks chains in `log` from now on. If a predecessor has done so before, its marks and the
    /// used index say where to go on, whatever base the frontend gave.
    pub(crate) fn track(mut self, mut log: Log) -> Self {
        let used = self.queue.next_used();
        if let Some(left) = log.recover(used) {
            if left > 0 {
                log::debug!("a predecessor left {left} requests in flight");
            }
            self.queue.set_next_avail(used.wrapping_add(left));
        }
        self.log = Some(log);
        self
    }

    /// Takes the next chain that a predecessor left in flight.
    pub(super) fn take_left(&mut self) -> Result<Option<Chain>, RingError> {
        let Some(head) = self.log.as_mut().and_then(Log::take_waiting) else { return Ok(None) };
        let descriptors = self.descriptors_at(head)?;
        let mut chain = Chain::check(descriptors, self.memory.clone())?;
        chain.is_repeated = true;
        Ok(Some(chain))
    }

    /// The chain that begins at `head`. `virtio_queue` only makes chains that an available ring
    /// holds, and the guest's own need not hold this one any more: so a ring of one entry is made
    /// in a page of our own, behind the guest's memory. The page is in the memory that the chain's
    /// descriptors are read from, and not in the one that its buffers lie in.
    fn descriptors_at(&self, head: u16) -> Result<DescriptorChain<MemoryGuard>, RingError> {
        let overflow = virtio_queue::Error::AddressOverflow;
        let page = self.memory.last_addr().0.checked_next_multiple_of(PAGE_BYTES);
        let page = page.filter(|page| page.checked_add(2 * PAGE_BYTES).is_some());
        let page = GuestAddress(page.ok_or(overflow)?);
        let own = usize::try_from(PAGE_BYTES).ok().and_then(|bytes| MmapRegion::new(bytes).ok());
        let own = own.and_then(|own| GuestRegionMmap::new(own, page));
        let memory = own.and_then(|own| self.memory.insert_region(own.into()).ok());
        let memory = SharedMemory::new(memory.ok_or(RingError::NoMemory)?).memory();
        // Flags, index, and the one entry (virtio 1.3, section 2.7.6).
        for (offset, value) in [(2, 1_u16), (4, head)] {
            let written = memory.write_obj(value.to_le(), GuestAddress(page.0 + offset));
            written.map_err(virtio_queue::Error::GuestMemory)?;
        }
        let mut queue = Queue::new(self.queue.size())?;
        queue.try_set_desc_table_address(GuestAddress(self.queue.desc_table()))?;
        queue.try_set_avail_ring_address(page)?;
        queue.set_ready(true);
        let chain = queue.iter(memory)?.next();
        chain.ok_or(RingError::NoMemory)
    }

    /// Where the ring stands, now that the device has finished what it had. What a predecessor
    /// left and nobody has taken goes back to the available ring if it stands there last, which
    /// it does unless chains were answered out of their order.
    pub(crate) fn give_up(mut self) -> Stand {
        let base = self.queue.next_avail();
        let Some(log) = &mut self.log else { return Stand { base, is_whole: true } };
        let Ok(left) = u16::try_from(log.waiting().len()) else {
            return Stand { base, is_whole: false };
        };
        let first = base.wrapping_sub(left);
        let (size, avail) = (self.queue.size(), self.queue.avail_ring());
        let stands_there = log.waiting().zip(0..).all(|(head, position)| {
            let slot = u64::from(first.wrapping_add(position) % size);
            let entry = self.memory.read_obj::<u16>(GuestAddress(avail + 4 + 2 * slot));
            entry.is_ok_and(|entry| u16::from_le(entry) == head)
        });
        if stands_there {
            log.release_waiting();
            Stand { base: first, is_whole: true }
        } else {
            Stand { base, is_whole: false }
        }
    }
}
