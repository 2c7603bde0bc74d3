//! Giving several chains back as one: what a packet in several buffers needs.

use std::num::Wrapping;

use virtio_queue::QueueT;
use vm_memory::{Address, Bytes, GuestAddress};

use super::{Chain, Ring, RingError};
use crate::inflight::{Step, reach};

impl Ring {
    /// Gives several chains back at once: the guest sees all of them or none, as one packet in
    /// several buffers needs it (virtio 1.3, section 5.1.6.4.1). Otherwise like [`Ring::push`].
    ///
    /// # Errors
    ///
    /// Fails if the used ring lies outside the guest's memory.
    pub fn push_together(
        &mut self,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), RingError> {
        let give_back = |(chain, written_bytes): (Chain, u32)| {
            self.log_chain(&chain);
            (chain.head, written_bytes)
        };
        let (heads, written): (Vec<u16>, Vec<u32>) = chains.into_iter().map(give_back).unzip();
        let Some((last_bytes, others)) = written.split_last() else { return Ok(()) };
        if let Some(log) = &self.log {
            for head in &heads {
                log.link(*head);
            }
        }
        let mut used = Wrapping(self.queue.next_used());
        for (head, written_bytes) in heads.iter().zip(others) {
            let written = self.write_used(used.0, *head, *written_bytes);
            self.broken |= written.is_err();
            written?;
            used += 1;
        }
        reach(Step::Written);
        self.queue.set_next_used(used.0);
        self.publish(&heads, *last_bytes)
    }

    /// Writes an element of the used ring without moving its index.
    fn write_used(&self, at: u16, head: u16, written_bytes: u32) -> Result<(), RingError> {
        // The used ring's header has 4 bytes and an element 8 (virtio 1.3, section 2.7.8).
        let offset = 4 + 8 * u64::from(at % self.queue.size());
        let address = GuestAddress(self.queue.used_ring())
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let element = u64::from(head) | u64::from(written_bytes) << 32;
        let written = self.memory.write_obj(element.to_le(), address);
        Ok(written.map_err(virtio_queue::Error::GuestMemory)?)
    }
}
