//! What a ring has to log while a frontend moves the running guest: see [`crate::dirty`].

use virtio_queue::QueueT as _;

use super::{Chain, Ring};
use crate::dirty::DirtyLog;

impl Ring {
    /// Logs written pages from now on, or no longer.
    pub(crate) fn log_dirty(&mut self, dirty: Option<DirtyLog>) {
        self.dirty = dirty;
        // What a predecessor wrote and had no time to log.
        self.log_used_ring();
    }

    pub(super) fn log_chain(&self, chain: &Chain) {
        if let Some(dirty) = &self.dirty {
            dirty.mark(&chain.memory, &chain.writable);
        }
    }

    pub(super) fn log_used_ring(&self) {
        if let Some(dirty) = &self.dirty {
            // Virtio 1.3, section 2.7.
            dirty.mark_used_ring(6 + 8 * u64::from(self.queue.size()));
        }
    }
}
