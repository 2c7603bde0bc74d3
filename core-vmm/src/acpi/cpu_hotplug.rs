//! The controller by which vCPUs come and go while the guest runs: its registers in
//! [`layout::CPU_HOTPLUG`], for which vCPU threads and the control thread share one lock, and its
//! AML.
//!
//! All registers have four bytes, little-endian; an access of another size or place reads as
//! zeros and writes nothing. No read changes anything.
//!
//! ```text
//! 0x00 select    rw  which vCPU the others are about
//! 0x04 status    r   1: it is there; 2: it came, unseen; 4: it is to go, unseen
//!                w   2: seen that it came; 4: seen that it is to go; 8: ejected
//! 0x08 next      r   the first vCPU with something unseen, or all ones
//! 0x0c event     w   what an `_OST` is about
//! 0x10 outcome   w   what came of it
//! 0x14 possible  r   how many vCPUs there can be
//! ```
//!
//! A vCPU's way (the guest's part is on the right):
//!
//! ```text
//! Absent --change()--> Arriving --_OST--> Present
//!   ^                     |                | ^
//!   |                  change()       change() _OST "no"
//!   |                     v                v |
//!   '---- parked() --- Ejected <--_EJ0--- Leaving
//! ```
//!
//! The guest is believed nothing: it can eject only what is to go, so that vCPU 0 always stays, and
//! what it tells of others is dropped.

mod aml;
mod registers;

use std::{
    fmt,
    sync::{Arc, Mutex},
};

pub(super) use aml::{append, scan_method};
pub use registers::{Change, LeavingError, News};

use self::registers::Registers;
use crate::{
    bus::BusDevice,
    event::{GuestEvent, Notifier},
    locked,
};

/// The controller of one VM.
pub struct CpuController {
    /// Locked by vCPU threads for one access and by the control thread for one change.
    registers: Mutex<Registers>,
    notifier: Arc<Notifier>,
}

impl CpuController {
    /// A controller with the first `present` of `possible` vCPUs there, telling `notifier`.
    #[must_use]
    pub fn new(present: u32, possible: u32, notifier: Arc<Notifier>) -> Self {
        Self { registers: Mutex::new(Registers::new(present, possible)), notifier }
    }

    /// How many vCPUs there are, with those that are to go.
    #[must_use]
    pub fn present(&self) -> u32 {
        locked(&self.registers).present()
    }

    /// How many there can be.
    #[must_use]
    pub fn possible(&self) -> u32 {
        locked(&self.registers).possible()
    }

    /// Has so many be there: some arrive, or some are to go, which the guest is then to be told.
    ///
    /// # Errors
    ///
    /// Fails if more are wanted while some have yet to go.
    pub fn change(&self, cpus: u32) -> Result<Change, LeavingError> {
        locked(&self.registers).change(cpus)
    }

    /// What the guest has done since the last time this was asked.
    #[must_use]
    pub fn take_news(&self) -> Vec<News> {
        locked(&self.registers).take_news()
    }

    /// Nobody runs vCPU `index` any more, which the guest had ejected.
    pub fn parked(&self, index: u32) {
        locked(&self.registers).parked(index);
    }

    /// Back to power-on, with every vCPU stopped: those that were to go are gone, and the others
    /// are the first ones. Gives how many there are.
    pub fn reset(&self) -> u32 {
        locked(&self.registers).reset()
    }
}

impl BusDevice for CpuController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = locked(&self.registers).read(offset, data.len()).to_le_bytes();
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let has_news = locked(&self.registers).write(offset, data);
        if has_news {
            self.notifier.notify(GuestEvent::Cpus);
        }
    }
}

impl fmt::Debug for CpuController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuController").finish_non_exhaustive()
    }
}
