//! The registers by which a guest finds RAM that comes and gives up RAM that is to go.
//!
//! ```text
//!            plug()            ask()            guest ejects           forget()
//! Absent ------------> Present -----> Leaving --------------> Ejected ---------> Absent
//!                         ^              |                       ^
//!                         `--- _OST -----'        reset() -------'
//!                          (it will not)       (of one that is leaving)
//! ```
//!
//! The control thread moves units by the methods, the guest by the registers; whatever the guest
//! writes, only a unit that is leaving can be ejected. An ejected one is absent for the guest at
//! once, so that `_STA` is right when `_EJ0` returns; the memory goes when the control thread has
//! heard of it.
//!
//! ```text
//! 0x00  SELECT  r/w  the unit that STATUS and the reports are about
//! 0x04  NEXT    r    the first unit with news for the guest; all ones: none
//! 0x08  STATUS  r    bit 0 present, bit 1 has come, bit 2 is to go
//!               w    bit 1, bit 2: the guest knows that; bit 3: eject
//! 0x0c  EVENT   r/w  what the next report is about
//! 0x10  REPORT  w    what became of it
//! ```
//!
//! All are 32 bits wide and are written only as a whole.

use std::sync::{Arc, Mutex, MutexGuard};

mod aml;

pub(super) use aml::append;

use super::ost::{
    BUS_CHECK, DEVICE_CHECK, EJECT_REQUEST, EJECTION_PENDING, INSERTION_PENDING, OWN_EJECTION,
    SUCCESS,
};
use crate::{
    bus::BusDevice,
    event::{GuestEvent, Notifier},
    locked,
};

/// The registers' places; the rest of the range reads as zero.
const SELECT: u64 = 0x00;
const NEXT: u64 = 0x04;
const STATUS: u64 = 0x08;
const EVENT: u64 = 0x0c;
const REPORT: u64 = 0x10;

const PRESENT: u32 = 1;
const HAS_COME: u32 = 1 << 1;
const IS_TO_GO: u32 = 1 << 2;
const EJECT: u32 = 1 << 3;
/// No unit.
const NONE: u32 = u32::MAX;

/// What a guest did or said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The unit is ejected: the guest uses it no more.
    Ejected {
        /// Which.
        unit: u32,
    },
    /// The unit stays: the guest will not give it up, and says so by this code of `_OST`.
    Kept {
        /// Which.
        unit: u32,
        /// Why.
        code: u32,
    },
    /// The guest can't use a unit that has come, and says so by this code of `_OST`.
    Unusable {
        /// Which.
        unit: u32,
        /// Why.
        code: u32,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Absent,
    Present,
    Leaving,
    Ejected,
}

#[derive(Clone, Copy, Debug, Default)]
struct Unit {
    stage: Stage,
    /// The guest has not heard that it has come.
    has_come: bool,
    /// The guest has not heard that it is to go.
    is_to_go: bool,
    /// The guest has not said what became of its coming.
    awaits_report: bool,
}

#[derive(Debug, Default)]
struct Registers {
    units: Vec<Unit>,
    select: u32,
    event: u32,
    /// At most two for each unit that came or was asked to go.
    reports: Vec<Report>,
}

/// The controller.
pub struct MemoryHotplug {
    /// Shared by the vCPU threads and the control thread.
    registers: Mutex<Registers>,
    notifier: Arc<Notifier>,
}

impl MemoryHotplug {
    /// A controller of so many units, all absent, that tells of reports by `notifier`.
    #[must_use]
    pub fn new(units: u32, notifier: Arc<Notifier>) -> Self {
        let units = (0..units).map(|_unit| Unit::default()).collect();
        let registers = Registers { units, ..Registers::default() };
        Self { registers: Mutex::new(registers), notifier }
    }

    /// A unit has come. The guest is to be interrupted then.
    pub fn plug(&self, unit: u32) {
        self.change(unit, |unit| {
            *unit = Unit {
                stage: Stage::Present,
                has_come: true,
                awaits_report: true,
                is_to_go: false,
            };
        });
    }

    /// A unit that is present is to go. The guest is to be interrupted then.
    pub fn ask(&self, unit: u32) {
        self.change(unit, |unit| {
            if unit.stage == Stage::Present {
                (unit.stage, unit.is_to_go) = (Stage::Leaving, true);
            }
        });
    }

    /// What an ejected unit was is gone: it can come again.
    pub fn forget(&self, unit: u32) {
        self.change(unit, |unit| *unit = Unit::default());
    }

    /// What the guest did and said since the last time this was asked, in order.
    #[must_use]
    pub fn take_reports(&self) -> Vec<Report> {
        std::mem::take(&mut self.lock().reports)
    }

    /// Back to power-on, with every vCPU stopped: what is present stays, and the guest finds it by
    /// looking; what is leaving is ejected.
    pub fn reset(&self) {
        let mut registers = self.lock();
        let registers = &mut *registers;
        (registers.select, registers.event) = (0, 0);
        for (index, unit) in (0..).zip(&mut registers.units) {
            if unit.stage == Stage::Leaving {
                unit.stage = Stage::Ejected;
                registers.reports.push(Report::Ejected { unit: index });
            }
            *unit = Unit { stage: unit.stage, ..Unit::default() };
        }
    }

    fn change(&self, unit: u32, change: impl FnOnce(&mut Unit)) {
        let mut registers = self.lock();
        if let Some(unit) = registers.unit(unit) {
            change(unit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        locked(&self.registers)
    }
}

impl BusDevice for MemoryHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = registers.read(at & !3).to_le_bytes()[usize::from(at.to_le_bytes()[0] & 3)];
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let tells = self.lock().write(offset, u32::from_le_bytes(bytes));
        if tells {
            self.notifier.notify(GuestEvent::Memory);
        }
    }
}

impl Registers {
    fn unit(&mut self, index: u32) -> Option<&mut Unit> {
        self.units.get_mut(usize::try_from(index).ok()?)
    }

    fn read(&mut self, offset: u64) -> u32 {
        match offset {
            SELECT => self.select,
            NEXT => {
                let news = self.units.iter().position(|unit| unit.has_come || unit.is_to_go);
                news.and_then(|unit| u32::try_from(unit).ok()).unwrap_or(NONE)
            }
            STATUS => self.unit(self.select).map_or(0, |unit| unit.status()),
            EVENT => self.event,
            _ => 0,
        }
    }

    /// Gives whether there is a new report.
    fn write(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            SELECT => self.select = value,
            EVENT => self.event = value,
            STATUS => return self.set_status(value),
            REPORT => return self.hear(value),
            _ => {}
        }
        false
    }

    fn set_status(&mut self, value: u32) -> bool {
        let index = self.select;
        let Some(unit) = self.unit(index) else { return false };
        if value & HAS_COME != 0 {
            unit.has_come = false;
        }
        if value & IS_TO_GO != 0 {
            unit.is_to_go = false;
        }
        if value & EJECT == 0 || unit.stage != Stage::Leaving {
            return false;
        }
        *unit = Unit { stage: Stage::Ejected, ..Unit::default() };
        self.reports.push(Report::Ejected { unit: index });
        true
    }

    /// `_OST` of the selected unit.
    fn hear(&mut self, code: u32) -> bool {
        let (index, event) = (self.select, self.event);
        let Some(unit) = self.unit(index) else { return false };
        let report = match event {
            BUS_CHECK | DEVICE_CHECK if unit.awaits_report && code != INSERTION_PENDING => {
                unit.awaits_report = false;
                (code != SUCCESS).then_some(Report::Unusable { unit: index, code })
            }
            // One that says that it did and did not has it still.
            EJECT_REQUEST | OWN_EJECTION
                if unit.stage == Stage::Leaving && code != EJECTION_PENDING =>
            {
                (unit.stage, unit.is_to_go) = (Stage::Present, false);
                Some(Report::Kept { unit: index, code })
            }
            _ => None,
        };
        self.reports.extend(report);
        report.is_some()
    }
}

impl Unit {
    fn status(self) -> u32 {
        let mut status = 0;
        if matches!(self.stage, Stage::Present | Stage::Leaving) {
            status |= PRESENT;
        }
        if self.has_come {
            status |= HAS_COME;
        }
        if self.is_to_go {
            status |= IS_TO_GO;
        }
        status
    }
}

#[cfg(test)]
mod tests;
