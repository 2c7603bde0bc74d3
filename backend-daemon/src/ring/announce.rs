//! When the guest is interrupted.
//!
//! With `EVENT_IDX` a guest names the one used element that it waits for. An interrupt that is left
//! out when that element is published is left out for good: no later element brings it. So each
//! element since the last decision counts, and where a decision may have reached nobody it is made
//! anew.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::QueueT;
use vm_memory::{Address, Bytes, GuestAddress};

use super::{Ring, RingError};
use crate::doorbell::Doorbell;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.3, section 2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

impl Ring {
    /// Interrupts the guest through this descriptor from now on, and once at the next occasion.
    /// QEMU starts a ring with a descriptor that leads nowhere, then gives it the guest's.
    pub(crate) fn set_call(&mut self, call: Option<Arc<Doorbell>>) {
        (self.call, self.owes_interrupt) = (call, true);
    }

    /// Interrupts the guest if something was pushed since the last time and the guest wants it;
    /// once after the start too, since a predecessor may have died before it could.
    pub(crate) fn announce(&mut self) -> Result<(), RingError> {
        let used = self.queue.next_used();
        let added = used.wrapping_sub(std::mem::replace(&mut self.announced, used));
        let owed = std::mem::take(&mut self.owes_interrupt);
        if (added > 0 || owed)
            && self.wants_interrupt(used, added, owed)?
            && let Some(call) = &self.call
            && let Err(error) = call.ring()
        {
            log::debug!("cannot interrupt the guest: {error}");
        }
        Ok(())
    }

    /// Whether the guest waits for one of the last `added` elements before `used`.
    fn wants_interrupt(&self, used: u16, added: u16, owed: bool) -> Result<bool, RingError> {
        // The used index must be visible before the guest's wish is read.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            return Ok(self.avail_word(0)? & AVAIL_NO_INTERRUPT == 0);
        }
        // Behind flags, index and elements (virtio 1.3, section 2.7.6).
        let event = self.avail_word(4 + 2 * u64::from(self.queue.size()))?;
        Ok(owed || used.wrapping_sub(event).wrapping_sub(1) < added)
    }

    fn avail_word(&self, offset: u64) -> Result<u16, RingError> {
        let address = GuestAddress(self.queue.avail_ring()).checked_add(offset);
        let address = address.ok_or(virtio_queue::Error::AddressOverflow)?;
        let word: Result<u16, _> = self.memory.load(address, Ordering::Relaxed);
        Ok(u16::from_le(word.map_err(virtio_queue::Error::GuestMemory)?))
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use virtio_queue::{Queue, QueueT};
    use vm_memory::GuestAddressSpace;

    use super::*;
    use crate::ring::{Chain, Memory, SharedMemory};

    const SIZE: u16 = 8;
    const DESCRIPTORS: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;

    /// A ring that starts at `index`, with all chains on offer, of a guest that waits for the
    /// element `event`.
    fn ring(index: u16, event: u16) -> Ring {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let put = |at: u64, value: u16| memory.write_obj(value.to_le(), GuestAddress(at)).unwrap();
        for head in 0..SIZE {
            let descriptor = [0x4000, 16_u64 | 2 << 32].map(u64::to_le);
            let at = DESCRIPTORS + 16 * u64::from(head);
            memory.write_obj(descriptor, GuestAddress(at)).unwrap();
            put(AVAIL + 4 + 2 * u64::from(index.wrapping_add(head) % SIZE), head);
        }
        put(AVAIL + 2, index.wrapping_add(SIZE));
        put(AVAIL + 4 + 2 * u64::from(SIZE), event);
        put(USED + 2, index);
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(true);
        queue.set_next_avail(index);
        queue.set_next_used(index);
        queue.set_ready(true);
        Ring::new(queue, SharedMemory::new(memory).memory(), None)
    }

    fn with_bell(ring: &mut Ring) -> Arc<Doorbell> {
        let bell = Arc::new(Doorbell::make().unwrap());
        ring.set_call(Some(Arc::clone(&bell)));
        bell
    }

    /// Whether the ring announces something now.
    fn rings(ring: &mut Ring, bell: &Doorbell) -> bool {
        ring.announce().unwrap();
        let mut bells = [PollFd::new(bell, PollFlags::IN)];
        let rang = poll(&mut bells, Some(&Timespec::default())).unwrap() == 1;
        bell.hear();
        rang
    }

    #[test]
    fn a_guest_hears_of_the_element_that_it_waits_for_among_others_of_one_go() {
        // One chain for itself, three together, and one more; the indices wrap around.
        for start in [0, u16::MAX - 2] {
            for waited in 0..SIZE {
                let mut ring = ring(start, start.wrapping_add(waited));
                let bell = with_bell(&mut ring);
                assert!(rings(&mut ring, &bell), "the first time");
                let mut chains: Vec<Chain> =
                    (0..5).map(|_chain| ring.pop().unwrap().unwrap()).collect();
                let last = chains.pop().unwrap();
                ring.push(chains.remove(0), 1).unwrap();
                ring.push_together(chains.into_iter().map(|chain| (chain, 1))).unwrap();
                ring.push(last, 1).unwrap();
                assert_eq!(rings(&mut ring, &bell), waited < 5, "{start} {waited}");
                assert!(!rings(&mut ring, &bell), "nothing was pushed since");
            }
        }
    }

    #[test]
    fn what_was_announced_to_nobody_is_announced_to_whom_it_concerns() {
        let mut ring = ring(7, 7);
        let nowhere = with_bell(&mut ring);
        let chain = ring.pop().unwrap().unwrap();
        ring.push(chain, 1).unwrap();
        assert!(rings(&mut ring, &nowhere));
        let bell = with_bell(&mut ring);
        assert!(rings(&mut ring, &bell) && !rings(&mut ring, &bell));
    }
}
