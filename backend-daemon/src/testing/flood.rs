//! A queue that is never empty: each answer of the device makes another request available.
//!
//! The available and the used ring lie at one place, so that the device itself moves the index
//! of both, and the queue begins full. No driver could refill a ring faster.

use super::Buffer;
use super::memory::GuestMemory;
use super::queue::{Descriptor, GuestQueue};

impl GuestQueue {
    /// Lays the queue out anew, with the same request behind each descriptor. The device has to
    /// be told; gives the base to begin with. The queue is of no use before a reset.
    pub(super) fn flood(&mut self, memory: &mut GuestMemory, buffers: &[Buffer<'_>]) -> u16 {
        let chain: Vec<Descriptor> = buffers
            .iter()
            .map(|buffer| match buffer {
                Buffer::Out(bytes) => {
                    let address = memory.allocate(bytes.len() as u64);
                    memory.write_bytes(address, bytes);
                    Descriptor::new(address, u32::try_from(bytes.len()).unwrap(), false)
                }
                Buffer::In(len_bytes) => {
                    let address = memory.allocate((*len_bytes).into());
                    Descriptor::new(address, *len_bytes, true)
                }
            })
            .collect();
        let table = Descriptor::indirect(memory, &chain);
        // What the device writes of a used chain may be read as the head of the next one.
        (0..self.size).for_each(|place| table.write(memory, self.descriptors(), place));
        let start = self.used_index(memory);
        self.rings_are_one = true;
        for slot in 0..u64::from(self.size) {
            memory.write(self.avail() + 4 + 2 * slot, 0_u16);
        }
        memory.write(self.avail() + 2, start.to_le());
        start.wrapping_sub(self.size)
    }
}
