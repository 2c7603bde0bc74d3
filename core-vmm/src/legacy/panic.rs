//! pvpanic: one port by which a guest's kernel says that it panicked (QEMU, docs/specs/pvpanic).

use std::sync::Arc;

use crate::{
    bus::BusDevice,
    event::{GuestEvent, Notifier},
};

/// The port, where QEMU has it.
pub const PORT: u16 = 0x505;
const PANICKED: u8 = 1 << 0;
/// A crash kernel is taking over: the guest is not done.
const CRASH_LOADED: u8 = 1 << 1;

/// The port.
pub struct PanicPort {
    notifier: Arc<Notifier>,
}

impl PanicPort {
    /// A port that tells `notifier`.
    #[must_use]
    pub fn new(notifier: Arc<Notifier>) -> Self {
        Self { notifier }
    }
}

impl BusDevice for PanicPort {
    /// Which events the port knows.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        if value & PANICKED != 0 {
            self.notifier.raise(GuestEvent::Panic);
        } else if value & CRASH_LOADED != 0 {
            log::warn!("the guest's kernel panicked and starts its crash kernel");
        }
    }
}
