//! Where in a ring the next backend goes on.
//!
//! After a drain the backend said it. After a crash the guest's memory does: everything before the
//! used index was answered. Where the ring is tracked in an inflight region, or answered strictly
//! in order, all that comes after it is done again and nothing else is; otherwise that is only
//! known if nothing was outstanding. The available index is never a base: all that was pending
//! would be skipped.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::kept::Kept;
use crate::virtio::features::IN_ORDER;
use crate::virtio::pci_registers::QueueLayout;

/// A position in a split ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// This entry of the available ring is the next.
    Exact(u16),
    /// A backend has served the ring and did not say how far.
    Unknown,
}

/// Nobody knows which requests of a ring were answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "queue {queue} has requests outstanding and its backend neither tracked them nor answers in \
     order; only a reset by the driver helps"
)]
pub struct BaseUnknown {
    /// The queue's number.
    pub queue: usize,
}

/// The base of every queue that the driver enabled.
///
/// # Errors
///
/// Fails if one can't be known.
pub(super) fn resolve(
    kept: &Kept,
    memory: &GuestMemoryMmap,
) -> Result<Vec<Option<u16>>, BaseUnknown> {
    let recoverable = kept.inflight.is_some() || kept.acknowledged & IN_ORDER != 0;
    let resolve = |(queue, (layout, base)): (usize, (QueueLayout, Base))| match base {
        Base::Exact(base) => Ok(base),
        Base::Unknown => {
            let unknown = BaseUnknown { queue };
            // The driver's rings were found in memory when it became ready, and memory stays.
            let used = index(memory, layout.used).ok_or(unknown)?;
            let available = index(memory, layout.available).ok_or(unknown)?;
            if recoverable || used == available { Ok(used) } else { Err(unknown) }
        }
    };
    let enabled = |vring: &super::kept::Vring| vring.layout.map(|layout| (layout, vring.base));
    let all = kept.vrings.iter().map(enabled).enumerate();
    all.map(|(queue, vring)| vring.map(|vring| resolve((queue, vring))).transpose()).collect()
}

/// The index field of an available or used ring (virtio 1.3, sections 2.7.6 and 2.7.8).
fn index(memory: &GuestMemoryMmap, ring: u64) -> Option<u16> {
    let at = GuestAddress(ring.checked_add(2)?);
    memory.load(at, Ordering::Acquire).ok().map(u16::from_le)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_read_where_the_specification_puts_it() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        memory.write_slice(&[9, 9, 0x34, 0x12], GuestAddress(16)).unwrap();
        assert_eq!(index(&memory, 16), Some(0x1234));
        assert_eq!(index(&memory, 4096), None);
        assert_eq!(index(&memory, u64::MAX), None);
    }
}
