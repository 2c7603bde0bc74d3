//! How a guest ends: ACPI's sleep and reset registers, and the old reset by keyboard controller.

use std::sync::Arc;

use crate::{
    bus::BusDevice,
    event::{GuestEvent, Notifier},
};

/// The first of the ACPI registers.
pub const PORT: u64 = 0x600;
/// How many there are.
pub const PORTS: u64 = 3;
/// Sleep control (ACPI 6.5, 4.8.3.7): type in bits 4:2, enable in bit 5.
pub const SLEEP_CONTROL: u64 = 0;
/// Sleep status: bit 7 would say that it woke.
pub const SLEEP_STATUS: u64 = 1;
/// Reset register.
pub const RESET: u64 = 2;
/// What to write there.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that stands for power off.
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u8 = 0b111 << 2;

/// The keyboard controller's command port.
pub const KEYBOARD_PORT: u64 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// The ACPI registers.
pub struct PowerRegisters {
    notifier: Arc<Notifier>,
}

/// The keyboard controller's port of which only the reset is there.
///
/// Reads find nothing: all ones is what makes a guest that looks for the controller give up at
/// once.
pub struct KeyboardReset {
    notifier: Arc<Notifier>,
}

impl PowerRegisters {
    /// Registers that tell `notifier`.
    #[must_use]
    pub fn new(notifier: Arc<Notifier>) -> Self {
        Self { notifier }
    }
}

impl KeyboardReset {
    /// A port that tells `notifier`.
    #[must_use]
    pub fn new(notifier: Arc<Notifier>) -> Self {
        Self { notifier }
    }
}

/// What a byte written to one of the ACPI registers asks for.
fn request(offset: u64, value: u8) -> Option<GuestEvent> {
    match offset {
        SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
            if value & SLEEP_TYPE == SLEEP_TYPE_OFF << 2 {
                return Some(GuestEvent::PowerOff);
            }
            log::warn!("the guest wants to sleep by {value:#x}, which this machine can't");
            None
        }
        RESET if value == RESET_VALUE => Some(GuestEvent::Reset),
        _ => None,
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [value] = *data
            && let Some(event) = request(offset, value)
        {
            self.notifier.raise(event);
        }
    }
}

impl BusDevice for KeyboardReset {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        if *data == [KEYBOARD_RESET] {
            self.notifier.raise(GuestEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_documented_values_end_the_guest() {
        assert!(matches!(request(SLEEP_CONTROL, 0x34), Some(GuestEvent::PowerOff)));
        assert!(request(SLEEP_CONTROL, 0x14).is_none(), "not enabled");
        assert!(request(SLEEP_CONTROL, 0x20).is_none(), "another sleep state");
        assert!(matches!(request(RESET, 1), Some(GuestEvent::Reset)));
        assert!(request(RESET, 0).is_none());
        assert!(request(SLEEP_STATUS, 0xff).is_none());
    }
}
