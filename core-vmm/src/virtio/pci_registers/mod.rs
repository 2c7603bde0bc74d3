//! The registers of a virtio-pci device (virtio 1.3, section 4.1.4), as a pure state machine.
//!
//! A guest writes, an [`Effect`] says what the owner has to do about it. Every write of any width,
//! at any place, in any state is answered: what makes no sense is [`Effect::Refused`] and changes
//! nothing.
//!
//! ```text
//! reset -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK -> (NEEDS_RESET)
//!   ^                                  only if the driver chose well     |
//!   `-- finish_reset <-- resetting (status still reads as before) <- 0 --'
//! ```

mod queue;

use super::features;
use crate::interrupt::{NO_VECTOR, SourceIndex};
use queue::Queue;

pub use queue::QueueLayout;

/// The device status bits (virtio 1.3, section 2.1).
pub mod status {
    /// The guest found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver runs.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device can't go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The guest gave up on the device.
    pub const FAILED: u8 = 128;
}

/// Bytes of the common configuration structure (virtio 1.3, section 4.1.4.3).
pub const COMMON_LEN_BYTES: u64 = 0x40;

/// What a guest's write asks of the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver is ready: start the backend.
    DriverOk,
    /// The driver resets the device: stop the backend, then [`PciRegisters::finish_reset`].
    Reset,
    /// A source fires another vector now, or none.
    Vector(SourceIndex, u16),
    /// The driver wrote to the device's configuration.
    ConfigWritten(ConfigWrite),
    /// The driver did what no driver does; nothing changed.
    Refused(&'static str),
}

/// A write to the device's own configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigWrite {
    /// From the configuration's start.
    pub offset: u32,
    /// At most eight.
    pub bytes: Vec<u8>,
}

/// What a driver agreed upon when it became ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activation {
    /// The features it acknowledged.
    pub features: u64,
    /// For each queue its layout, if the driver enabled it.
    pub queues: Vec<Option<QueueLayout>>,
}

/// All registers but the notification area, which has no state.
#[derive(Debug)]
pub struct PciRegisters {
    offered: u64,
    acknowledged: u64,
    offered_select: u32,
    acknowledged_select: u32,
    config_vector: u16,
    status: u8,
    resetting: bool,
    generation: u8,
    isr: u8,
    queue_select: u16,
    queues: Vec<Queue>,
    config: Vec<u8>,
    config_writable: bool,
}

impl PciRegisters {
    /// A device with these features, queues of at most these sizes (powers of two), and this
    /// configuration, which the driver may write if `config_writable`.
    #[must_use]
    pub fn new(offered: u64, queue_sizes: &[u16], config: Vec<u8>, config_writable: bool) -> Self {
        Self {
            offered,
            acknowledged: 0,
            offered_select: 0,
            acknowledged_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            resetting: false,
            generation: 0,
            isr: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(Queue::new).collect(),
            config,
            config_writable,
        }
    }

    fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// The source that fires on a change of the configuration: the one after the queues'.
    #[must_use]
    pub fn config_source(&self) -> SourceIndex {
        SourceIndex(self.queue_count())
    }

    /// The device status.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the driver asked for a reset that is not finished.
    #[must_use]
    pub fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// Whether the driver is ready and did not ask for a reset since.
    #[must_use]
    pub fn is_driver_ok(&self) -> bool {
        self.status & status::DRIVER_OK != 0 && !self.resetting
    }

    /// What the driver agreed upon.
    #[must_use]
    pub fn activation(&self) -> Activation {
        let layout = |queue: &Queue| queue.enabled.then_some(queue.layout);
        Activation { features: self.acknowledged, queues: self.queues.iter().map(layout).collect() }
    }

    /// The device is as after power-on, except for its configuration's generation.
    pub fn finish_reset(&mut self) {
        self.acknowledged = 0;
        self.offered_select = 0;
        self.acknowledged_select = 0;
        self.config_vector = NO_VECTOR;
        self.status = 0;
        self.resetting = false;
        self.isr = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = Queue::new(queue.max_size);
        }
    }

    /// The device can't go on. True if the driver is to be told by a configuration interrupt
    /// (virtio 1.3, section 2.1.2: only once it is ready).
    pub fn set_needs_reset(&mut self) -> bool {
        let tell = self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK;
        if self.status & status::DRIVER_OK != 0 {
            self.status |= status::NEEDS_RESET;
        }
        tell
    }

    /// Offers nothing any more that is not in `offered`.
    pub fn restrict_offer(&mut self, offered: u64) {
        self.offered &= offered;
    }

    /// What the backend says the configuration is now. True if it changed.
    pub fn set_config(&mut self, config: &[u8]) -> bool {
        if self.config == config {
            return false;
        }
        self.config.clear();
        self.config.extend_from_slice(config);
        self.generation = self.generation.wrapping_add(1);
        true
    }

    /// Sets the configuration bit of the interrupt status, for a driver that polls it.
    pub fn raise_config_isr(&mut self) {
        self.isr |= 2;
    }

    /// The driver reads the interrupt status, which clears it (virtio 1.3, section 4.1.4.5).
    pub fn read_isr(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == 0
            && let Some(first) = data.first_mut()
        {
            *first = std::mem::take(&mut self.isr);
        }
    }

    /// Fills `data` from the device's configuration; what lies beyond it reads as zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in (0..).zip(data) {
            let at = offset.saturating_add(index);
            let known = usize::try_from(at).ok().and_then(|at| self.config.get(at));
            *byte = known.copied().unwrap_or(0);
        }
    }

    /// The driver writes to the device's configuration. What it reads back is what it wrote, until
    /// the backend says otherwise.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) -> Effect {
        if !self.config_writable || self.resetting {
            return Effect::Refused("wrote to a configuration that is read-only");
        }
        let range = usize::try_from(offset)
            .ok()
            .and_then(|start| Some(start..start.checked_add(data.len())?))
            .filter(|range| range.end <= self.config.len());
        let Some((range, offset)) = range.zip(u32::try_from(offset).ok()) else {
            return Effect::Refused("wrote beyond the configuration");
        };
        self.config[range].copy_from_slice(data);
        Effect::ConfigWritten(ConfigWrite { offset, bytes: data.to_vec() })
    }

    /// Fills `data` from the common configuration; what lies beyond it reads as zero.
    pub fn read_common(&self, offset: u64, data: &mut [u8]) {
        let common = self.common();
        for (index, byte) in (0..).zip(data) {
            let at = offset.saturating_add(index);
            let known = usize::try_from(at).ok().and_then(|at| common.get(at));
            *byte = known.copied().unwrap_or(0);
        }
    }

    /// The structure as it reads now.
    fn common(&self) -> [u8; 0x40] {
        let mut bytes = [0; 0x40];
        let mut set = |at: usize, value: &[u8]| {
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        set(0x00, &self.offered_select.to_le_bytes());
        set(0x04, &half(self.offered, self.offered_select).to_le_bytes());
        set(0x08, &self.acknowledged_select.to_le_bytes());
        set(0x0c, &half(self.acknowledged, self.acknowledged_select).to_le_bytes());
        set(0x10, &self.config_vector.to_le_bytes());
        set(0x12, &self.queue_count().to_le_bytes());
        set(0x14, &[self.status, self.generation]);
        set(0x16, &self.queue_select.to_le_bytes());
        let Some(queue) = self.queues.get(usize::from(self.queue_select)) else {
            // A size of zero says that there is no such queue (virtio 1.3, section 4.1.4.3).
            set(0x1a, &NO_VECTOR.to_le_bytes());
            return bytes;
        };
        set(0x18, &queue.layout.size.to_le_bytes());
        set(0x1a, &queue.vector.to_le_bytes());
        set(0x1c, &u16::from(queue.enabled).to_le_bytes());
        set(0x1e, &self.queue_select.to_le_bytes());
        set(0x20, &queue.layout.descriptors.to_le_bytes());
        set(0x28, &queue.layout.available.to_le_bytes());
        set(0x30, &queue.layout.used.to_le_bytes());
        bytes
    }

    /// The driver writes to the common configuration: whole fields, 64-bit ones also by halves
    /// (virtio 1.3, section 4.1.3.1).
    pub fn write_common(&mut self, offset: u64, data: &[u8]) -> Effect {
        if self.resetting {
            return Effect::Refused("wrote to a device that is being reset");
        }
        match (offset, data) {
            (0x00, &[a, b, c, d]) => self.offered_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => self.acknowledged_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => return self.acknowledge(u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => {
                self.config_vector = self.valid_vector(u16::from_le_bytes([a, b]));
                return Effect::Vector(self.config_source(), self.config_vector);
            }
            (0x14, &[status]) => return self.set_status(status),
            (0x16, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (0x1a, &[a, b]) => return self.set_queue_vector(u16::from_le_bytes([a, b])),
            (0x18, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                return self.set_up_queue(|queue| queue.set_size(size));
            }
            // There is no way to disable one queue (virtio 1.3, section 4.1.4.3.2).
            (0x1c, &[1, 0]) => return self.set_up_queue(Queue::enable),
            (0x20..0x38, &[_, _, _, _] | &[_, _, _, _, _, _, _, _])
                if offset.is_multiple_of(data.len() as u64) =>
            {
                return self.set_up_queue(|queue| queue.set_address(offset - 0x20, data));
            }
            _ => return Effect::Refused("wrote to no field of the common configuration"),
        }
        Effect::None
    }

    fn acknowledge(&mut self, bits: u32) -> Effect {
        if self.status & status::FEATURES_OK != 0 {
            return Effect::Refused("changed features that are agreed upon");
        }
        let (low, high) = (half(self.acknowledged, 0), half(self.acknowledged, 1));
        let (low, high) = match self.acknowledged_select {
            0 => (bits, high),
            1 => (low, bits),
            // Nothing is offered there, and drivers write the zeros that say so.
            _ => return Effect::None,
        };
        self.acknowledged = u64::from(low) | u64::from(high) << 32;
        Effect::None
    }

    fn set_status(&mut self, wanted: u8) -> Effect {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};
        if wanted == 0 {
            if self.status == 0 {
                // Features and queues may have been written without any status.
                self.finish_reset();
                return Effect::None;
            }
            self.resetting = true;
            return Effect::Reset;
        }
        let wanted = wanted & !NEEDS_RESET | self.status & NEEDS_RESET;
        if self.status & !wanted != 0 {
            return Effect::Refused("cleared a status bit");
        }
        let mut new = wanted & !self.status;
        let mut refused = Effect::None;
        if new & FEATURES_OK != 0
            && (wanted & (ACKNOWLEDGE | DRIVER) != ACKNOWLEDGE | DRIVER
                || !features::is_acceptable(self.acknowledged, self.offered))
        {
            // The driver reads the status back and sees that the bit is not there.
            new &= !FEATURES_OK;
            refused = Effect::Refused("chose features that it was not offered");
        }
        if new & DRIVER_OK != 0 && (self.status | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
            refused = Effect::Refused("was ready before features were agreed upon");
        }
        self.status |= new;
        if new & DRIVER_OK == 0 { refused } else { Effect::DriverOk }
    }

    /// Vectors are one for each source.
    fn valid_vector(&self, vector: u16) -> u16 {
        if vector <= self.config_source().0 { vector } else { NO_VECTOR }
    }

    fn set_queue_vector(&mut self, vector: u16) -> Effect {
        let vector = self.valid_vector(vector);
        match self.queues.get_mut(usize::from(self.queue_select)) {
            None => Effect::Refused("chose a vector for a queue that does not exist"),
            Some(queue) => {
                queue.vector = vector;
                Effect::Vector(SourceIndex(self.queue_select), vector)
            }
        }
    }

    /// The selected queue, as long as the driver may set it up (virtio 1.3, section 4.1.4.3.2).
    fn open_queue(&mut self) -> Option<&mut Queue> {
        let open = self.status & status::DRIVER_OK == 0;
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| open && !queue.enabled)
    }

    fn set_up_queue(&mut self, set: impl FnOnce(&mut Queue) -> bool) -> Effect {
        match self.open_queue().map(set) {
            Some(true) => Effect::None,
            Some(false) => Effect::Refused("chose an impossible size or state for a queue"),
            None => Effect::Refused("set up a queue that is running or does not exist"),
        }
    }
}

/// 32 of 64 feature bits; there are none above.
fn half(features: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
