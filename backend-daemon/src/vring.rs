//! What the frontend said of one queue, and the ring that follows from it.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use crate::doorbell::Doorbell;
use crate::inflight::InflightError;
use crate::memory::Table;
use crate::ring::{MemoryGuard, Ring, RingError};

/// Where the frontend says a ring lies, by its own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

/// How the guest's kicks come.
#[derive(Clone, Debug)]
pub(crate) enum Kick {
    /// By a descriptor.
    Rings(Arc<Doorbell>),
    /// Not at all: the frontend sent no descriptor.
    Silent,
}

/// One queue's settings. The ring itself belongs to its worker.
#[derive(Debug)]
pub(crate) struct Vring {
    pub(crate) size: u16,
    pub(crate) addresses: Option<Addresses>,
    /// The guest address under which writes to the used ring are logged, if they are to be.
    pub(crate) logged_at: Option<u64>,
    /// Where to go on in the available ring, while the ring doesn't run.
    pub(crate) base: u16,
    /// The frontend's sign that the ring is set up; it starts with it and stops without.
    pub(crate) kick: Option<Kick>,
    pub(crate) call: Option<Arc<Doorbell>>,
    pub(crate) err: Option<Arc<Doorbell>>,
    pub(crate) enabled: bool,
    /// The worker has the ring.
    pub(crate) running: bool,
    /// The ring ran, and `base` says where it stands: nothing waits in the inflight region.
    pub(crate) is_whole: bool,
}

/// Why a ring can't start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the ring has no addresses")]
    NoAddresses,
    #[error("the ring's address {user:#x} is not in the memory table")]
    Untranslated { user: u64 },
    #[error("the ring's {len_bytes} bytes at {guest:#x} lie outside the guest's memory")]
    Outside { guest: u64, len_bytes: usize },
    #[error("the ring's settings")]
    Ring(#[from] RingError),
    #[error("the ring's part of the inflight region")]
    Inflight(#[from] InflightError),
}

impl Vring {
    /// A queue of which nothing was said yet.
    pub(crate) fn new(max_size: u16) -> Self {
        Self {
            size: max_size,
            addresses: None,
            logged_at: None,
            base: 0,
            kick: None,
            call: None,
            err: None,
            enabled: false,
            running: false,
            is_whole: false,
        }
    }

    /// The ring, to be started at `base`.
    pub(crate) fn ring(
        &self,
        table: &Table,
        memory: MemoryGuard,
        event_idx: bool,
    ) -> Result<Ring, StartError> {
        let addresses = self.addresses.ok_or(StartError::NoAddresses)?;
        let size = usize::from(self.size);
        // The areas' sizes: virtio 1.3, section 2.7.
        let descriptors = area(table, &memory, addresses.descriptors, 16 * size)?;
        let avail = area(table, &memory, addresses.avail, 6 + 2 * size)?;
        let used = area(table, &memory, addresses.used, 6 + 8 * size)?;
        let mut queue = Queue::new(self.size).map_err(RingError::from)?;
        queue.try_set_desc_table_address(descriptors).map_err(RingError::from)?;
        queue.try_set_avail_ring_address(avail).map_err(RingError::from)?;
        queue.try_set_used_ring_address(used).map_err(RingError::from)?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.base);
        let Wrapping(used) =
            queue.used_idx(&*memory, Ordering::Acquire).map_err(RingError::from)?;
        queue.set_next_used(used);
        queue.set_ready(true);
        Ok(Ring::new(queue, memory, self.call.clone()))
    }
}

fn area(
    table: &Table,
    memory: &MemoryGuard,
    user: u64,
    len_bytes: usize,
) -> Result<GuestAddress, StartError> {
    let guest = table.translate(user).ok_or(StartError::Untranslated { user })?;
    if !memory.check_range(guest, len_bytes) {
        return Err(StartError::Outside { guest: guest.0, len_bytes });
    }
    Ok(guest)
}
