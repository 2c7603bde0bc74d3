//! The registers of one queue.

use crate::interrupt::NO_VECTOR;

/// Where a driver put a queue, and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Descriptors; a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

/// One queue as its driver sets it up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    pub(super) max_size: u16,
    pub(super) layout: QueueLayout,
    pub(super) vector: u16,
    pub(super) enabled: bool,
}

impl Queue {
    /// After a reset a queue has its largest size.
    pub(super) fn new(max_size: u16) -> Self {
        let layout = QueueLayout { size: max_size, descriptors: 0, available: 0, used: 0 };
        Self { max_size, layout, vector: NO_VECTOR, enabled: false }
    }

    /// False, and no change, if that is no size (virtio 1.3, section 2.7).
    pub(super) fn set_size(&mut self, size: u16) -> bool {
        let possible = size.is_power_of_two() && size <= self.max_size;
        if possible {
            self.layout.size = size;
        }
        possible
    }

    pub(super) fn enable(&mut self) -> bool {
        self.enabled = true;
        true
    }

    /// Writes four or eight bytes of one of the three addresses, which lie one after the other.
    pub(super) fn set_address(&mut self, offset: u64, data: &[u8]) -> bool {
        let address = match offset / 8 {
            0 => &mut self.layout.descriptors,
            1 => &mut self.layout.available,
            _ => &mut self.layout.used,
        };
        let mut bytes = address.to_le_bytes();
        let within = if offset.is_multiple_of(8) { 0 } else { 4 };
        bytes[within..within + data.len()].copy_from_slice(data);
        *address = u64::from_le_bytes(bytes);
        true
    }
}
