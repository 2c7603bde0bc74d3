//! RAM that comes and goes.
//!
//! ```text
//! more:   file -> mapping -> KVM slot -> every backend -> the host's devices -> the guest is told
//! fewer:  the guest is told, and ejects -> the host's devices -> every backend -> KVM slot
//!         -> mapping -> the file's pages
//! ```
//!
//! So whoever may be asked to read or write RAM knows it before the guest does, and nobody but the
//! guest touches what it is told to give up before it has. A backend that does not follow is lost:
//! it is never left half told, and its successor is told all. What the host refuses is undone, and
//! the guest hears nothing.
//!
//! A reset of the guest keeps what is present: the guest finds it as memory devices again, which it
//! can give up, and not in the memory map that it boots with. What was to go is gone.

use std::{collections::BTreeSet, io, sync::Arc};

use nacre_proto::vmm::{Event, Resource};
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestRegionMmap};

use crate::{
    acpi::{
        ged::{self, EventDevice},
        memory_hotplug::{MemoryHotplug, Report},
    },
    devices::Devices,
    error_chain,
    memory::{
        hotplug::{Change, Plan},
        region::{GuestRam, MemoryError},
        unit::{Site, Unit},
    },
};

/// Those who have to know the guest's RAM.
pub trait Followers {
    /// Which of them takes the fewest regions of memory, and how many.
    fn fewest_regions(&self) -> Option<(String, usize)>;

    /// Has every backend's memory be `memory`. One that can't is lost.
    fn follow(&mut self, memory: &GuestMemoryMmap);

    /// Lets the host's devices reach RAM that has come.
    ///
    /// # Errors
    ///
    /// Fails, in words, if one of them can't; none of them can then.
    fn map_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), String>;

    /// Keeps the host's devices from RAM that is about to go.
    ///
    /// # Errors
    ///
    /// Fails, in words, if one of them may still reach it.
    fn unmap_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), String>;
}

impl Followers for Devices {
    fn fewest_regions(&self) -> Option<(String, usize)> {
        Self::fewest_regions(self)
    }

    fn follow(&mut self, memory: &GuestMemoryMmap) {
        self.follow_memory(memory);
    }

    fn map_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), String> {
        Self::map_for_dma(self, region).map_err(|error| error_chain(&error))
    }

    fn unmap_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), String> {
        Self::unmap_for_dma(self, region).map_err(|error| error_chain(&error))
    }
}

/// Why there is not as much RAM as was asked for.
#[derive(Debug, thiserror::Error)]
pub enum SetMemoryError {
    /// A backend has no room in its table.
    #[error(
        "guest memory in {wanted} regions is more than the {most} that the backend of {device} takes"
    )]
    Regions {
        /// As there would be.
        wanted: usize,
        /// The most.
        most: usize,
        /// Whose.
        device: String,
    },
    /// Its places in the guest are not free.
    #[error("{0} places for memory are held by devices of the host's")]
    Held(usize),
    /// The host or KVM has none.
    #[error("no memory can be plugged")]
    Memory(#[from] MemoryError),
    /// A device of the host's can't reach it.
    #[error("the host's devices can't reach memory that is plugged: {0}")]
    Dma(String),
    /// The event device.
    #[error("the guest can't be told")]
    Event(#[source] io::Error),
}

/// The RAM of one VM as far as it comes and goes.
pub struct Memory {
    site: Site,
    controller: Arc<MemoryHotplug>,
    /// Oldest first.
    units: Vec<Unit>,
    /// Those that the guest was asked for and has neither ejected nor refused.
    leaving: BTreeSet<u32>,
    /// Those that it refused since it was asked, and why.
    kept: Vec<(u32, u32)>,
    /// Those that the guest has given up but a device of the host's has not.
    stuck: Vec<Unit>,
}

impl Memory {
    /// None yet, to come from `site`, of which the guest learns by `controller`.
    #[must_use]
    pub fn new(site: Site, controller: Arc<MemoryHotplug>) -> Self {
        let (units, kept, stuck) = (Vec::new(), Vec::new(), Vec::new());
        Self { site, controller, units, leaving: BTreeSet::new(), kept, stuck }
    }

    /// What the guest reaches.
    #[must_use]
    pub fn controller(&self) -> &Arc<MemoryHotplug> {
        &self.controller
    }

    /// Which RAM there can be.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        self.site.plan()
    }

    /// How much RAM there is, with what is to go.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.plan().bytes_with(self.units.len())
    }

    /// Whether some of it is to go.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Has so much RAM, which the plan allows, while none is leaving, and tells the guest.
    ///
    /// # Errors
    ///
    /// Fails if the host, KVM or a backend has no room for it; there is as much as before then.
    pub fn set(
        &mut self,
        bytes: u64,
        ram: &mut GuestRam,
        followers: &mut impl Followers,
        events: &EventDevice,
    ) -> Result<(), SetMemoryError> {
        let present: Vec<_> = self.units.iter().map(Unit::number).collect();
        let held: Vec<_> = self.stuck.iter().map(Unit::number).collect();
        match self.plan().change(&present, &held, bytes) {
            Change::Plug(numbers)
                if self.plan().bytes_with(present.len() + numbers.len()) != bytes =>
            {
                return Err(SetMemoryError::Held(held.len()));
            }
            Change::Plug(numbers) if numbers.is_empty() => return Ok(()),
            Change::Plug(numbers) => {
                let units = self.plug(&numbers, ram, followers)?;
                log::info!("memory units {numbers:?} are plugged");
                self.units.extend(units);
                numbers.iter().for_each(|number| self.controller.plug(*number));
            }
            Change::Unplug(numbers) => {
                log::info!("memory units {numbers:?} are to go");
                numbers.iter().for_each(|number| self.controller.ask(*number));
                self.leaving.extend(numbers);
            }
        }
        events.raise(ged::Event::Memory).map_err(SetMemoryError::Event)
    }

    fn plug(
        &self,
        numbers: &[u32],
        ram: &mut GuestRam,
        followers: &mut impl Followers,
    ) -> Result<Vec<Unit>, SetMemoryError> {
        let wanted = ram.memory.num_regions() + numbers.len();
        if let Some((device, most)) = followers.fewest_regions().filter(|(_, most)| wanted > *most)
        {
            return Err(SetMemoryError::Regions { wanted, most, device });
        }
        let units = numbers
            .iter()
            .map(|number| self.site.make(*number))
            .collect::<Result<Vec<_>, MemoryError>>()?;
        for unit in &units {
            if let Err(error) = ram.add(unit.region()) {
                Self::undo(units, &[], ram, followers);
                return Err(error.into());
            }
        }
        followers.follow(&ram.memory);
        let mut mapped = Vec::new();
        for unit in &units {
            if let Err(reason) = followers.map_for_dma(unit.region()) {
                Self::undo(units, &mapped, ram, followers);
                return Err(SetMemoryError::Dma(reason));
            }
            mapped.push(unit.number());
        }
        Ok(units)
    }

    /// Takes back what the guest was not told of.
    fn undo(units: Vec<Unit>, mapped: &[u32], ram: &mut GuestRam, followers: &mut impl Followers) {
        for unit in &units {
            if mapped.contains(&unit.number())
                && let Err(reason) = followers.unmap_for_dma(unit.region())
            {
                log::error!("the host's devices don't let go of memory: {reason}");
            }
            ram.remove(unit.region());
        }
        followers.follow(&ram.memory);
        drop(units);
    }

    /// Does what the guest's ejections ask for; what the supervisor is to know of them and of
    /// refusals.
    #[must_use]
    pub fn process(&mut self, ram: &mut GuestRam, followers: &mut impl Followers) -> Vec<Event> {
        let mut events = Vec::new();
        let mut ejected = Vec::new();
        for report in self.controller.take_reports() {
            match report {
                Report::Ejected { unit } => {
                    self.leaving.remove(&unit);
                    ejected.push(unit);
                }
                Report::Kept { unit, code } => {
                    self.leaving.remove(&unit);
                    self.kept.push((unit, code));
                }
                Report::Unusable { unit, code } => {
                    let reason = format!("the guest can't use {}", self.describe(&[(unit, code)]));
                    events.push(Event::Declined { what: Resource::Memory, reason });
                }
            }
        }
        if !ejected.is_empty() {
            self.unplug(&ejected, ram, followers);
            events.push(Event::MemoryChanged { bytes: self.bytes() });
        }
        if self.leaving.is_empty() && !self.kept.is_empty() {
            let kept = std::mem::take(&mut self.kept);
            let reason = format!("the guest keeps {}", self.describe(&kept));
            events.push(Event::Declined { what: Resource::Memory, reason });
        }
        events
    }

    /// Such as "the memory device at 0x100000000 (_OST 0x82, busy)".
    fn describe(&self, units: &[(u32, u32)]) -> String {
        let each = units.iter().map(|(unit, code)| {
            let start = self.plan().range(*unit).start;
            format!("the memory device at {start:#x} (_OST {code:#x}, {})", meaning(*code))
        });
        each.collect::<Vec<_>>().join(", ")
    }

    fn unplug(&mut self, ejected: &[u32], ram: &mut GuestRam, followers: &mut impl Followers) {
        let is_ejected = |unit: &mut Unit| ejected.contains(&unit.number());
        let mut gone = Vec::new();
        for unit in self.units.extract_if(.., is_ejected) {
            ram.remove(unit.region());
            match followers.unmap_for_dma(unit.region()) {
                Ok(()) => gone.push(unit),
                Err(reason) => {
                    // The device would write to whatever the host's pages are then.
                    log::error!("the host's devices don't let go of memory: {reason}");
                    self.stuck.push(unit);
                }
            }
        }
        followers.follow(&ram.memory);
        for unit in gone {
            let number = unit.number();
            drop(unit);
            self.controller.forget(number);
            log::info!("memory unit {number} is gone");
        }
    }

    /// Ends what is pending, with every vCPU stopped: what was to go is gone. What the supervisor
    /// is to know of it.
    #[must_use]
    pub fn reset(&mut self, ram: &mut GuestRam, followers: &mut impl Followers) -> Vec<Event> {
        self.controller.reset();
        self.process(ram, followers)
    }

    /// Makes all of it zero again, for a reset.
    ///
    /// # Errors
    ///
    /// Fails if the host can't.
    pub fn wipe(&self) -> Result<(), MemoryError> {
        self.units.iter().try_for_each(Unit::wipe)
    }
}

/// What a guest says by a code of `_OST` (ACPI 6.5, tables 6.61 and 6.62, as far as the two agree).
fn meaning(code: u32) -> &'static str {
    match code {
        0 => "it says that it has done it",
        1 => "it failed",
        2 => "it does not know the request",
        0x80 => "it does not support it",
        0x81 => "in use by a program",
        0x82 => "busy",
        0x83 => "something that depends on it is busy",
        _ => "for a reason of its own",
    }
}

#[cfg(test)]
mod tests;
