//! The registers as a pure state machine.

use crate::{acpi::ost, pci::complaint::Complaints};

pub(super) const SELECT: u64 = 0x00;
pub(super) const STATUS: u64 = 0x04;
pub(super) const NEXT: u64 = 0x08;
pub(super) const OST_EVENT: u64 = 0x0c;
pub(super) const OST_OUTCOME: u64 = 0x10;
pub(super) const POSSIBLE: u64 = 0x14;

pub(super) const IS_THERE: u32 = 1 << 0;
pub(super) const CAME: u32 = 1 << 1;
pub(super) const IS_TO_GO: u32 = 1 << 2;
pub(super) const EJECT: u32 = 1 << 3;

/// What [`NEXT`] says when there is nothing.
pub(super) const NONE: u32 = u32::MAX;

/// The vCPU that a guest always has.
const FIRST: u32 = 0;

/// Some vCPUs have yet to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has not yet given up {0} vCPUs that are to go")]
pub struct LeavingError(pub u32);

/// What a change has begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Those that are there from now on.
    pub arrived: Vec<u32>,
    /// Whether the guest has something to look at.
    pub is_news_to_guest: bool,
}

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// It ejected this vCPU, which is no longer its own.
    Ejected(u32),
    /// It can't use this vCPU, which came, or keeps it although it was to go.
    Declined {
        /// Which.
        index: u32,
        /// Whether it was to go.
        was_to_go: bool,
        /// The status that it gave (ACPI 6.5, tables 6.60 and 6.61).
        status: u32,
    },
}

/// Where a vCPU is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Absent,
    /// The guest has not said what it makes of it.
    Arriving,
    Present,
    /// The guest was asked to eject it.
    Leaving,
    /// The guest has ejected it; its thread has yet to be stopped.
    Ejected,
}

#[derive(Clone, Copy, Debug)]
struct Cpu {
    stage: Stage,
    /// The guest has not seen that it came.
    came: bool,
    /// The guest has not seen that it is to go.
    is_to_go: bool,
}

impl Cpu {
    const ABSENT: Self = Self { stage: Stage::Absent, came: false, is_to_go: false };
    const PRESENT: Self = Self { stage: Stage::Present, ..Self::ABSENT };

    fn is_there(self) -> bool {
        matches!(self.stage, Stage::Arriving | Stage::Present | Stage::Leaving)
    }

    fn stays(self) -> bool {
        matches!(self.stage, Stage::Arriving | Stage::Present)
    }
}

/// All that the guest and the control thread can see and set.
#[derive(Debug)]
pub(super) struct Registers {
    cpus: Vec<Cpu>,
    selected: u32,
    ost_event: u32,
    /// At most two for each change of a vCPU that the control thread made.
    news: Vec<News>,
    complaints: Complaints,
}

impl Registers {
    pub(super) fn new(present: u32, possible: u32) -> Self {
        let cpu = |index| if index < present { Cpu::PRESENT } else { Cpu::ABSENT };
        Self {
            cpus: (0..possible).map(cpu).collect(),
            selected: 0,
            ost_event: 0,
            news: Vec::new(),
            complaints: Complaints::about("vCPU hotplug"),
        }
    }

    pub(super) fn present(&self) -> u32 {
        self.count(Cpu::is_there)
    }

    pub(super) fn possible(&self) -> u32 {
        self.count(|_cpu| true)
    }

    fn count(&self, what: impl Fn(Cpu) -> bool) -> u32 {
        (0..).zip(&self.cpus).filter(|(_index, cpu)| what(**cpu)).map(|(_, _)| 1_u32).sum()
    }

    pub(super) fn change(&mut self, cpus: u32) -> Result<Change, LeavingError> {
        let staying = self.count(Cpu::stays);
        let leaving = self.present() - staying;
        if cpus > staying && leaving > 0 {
            return Err(LeavingError(leaving));
        }
        let mut change = Change::default();
        let mut missing = cpus.saturating_sub(staying);
        for (index, cpu) in (0..).zip(&mut self.cpus) {
            if missing > 0 && cpu.stage == Stage::Absent {
                *cpu = Cpu { stage: Stage::Arriving, came: true, is_to_go: false };
                change.arrived.push(index);
                missing -= 1;
            }
        }
        let mut too_many = staying.saturating_sub(cpus);
        for (index, cpu) in (0..self.possible()).zip(&mut self.cpus).rev() {
            if too_many > 0 && index != FIRST && cpu.stays() {
                cpu.stage = Stage::Leaving;
                too_many -= 1;
            }
            // Also those of an earlier time: a guest that missed it is told again.
            cpu.is_to_go |= cpu.stage == Stage::Leaving;
        }
        change.is_news_to_guest = self.next() != NONE;
        Ok(change)
    }

    pub(super) fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    pub(super) fn parked(&mut self, index: u32) {
        if let Some(cpu) = self.cpu(index)
            && cpu.stage == Stage::Ejected
        {
            *cpu = Cpu::ABSENT;
        }
    }

    pub(super) fn reset(&mut self) -> u32 {
        let present = self.count(Cpu::stays);
        let possible = self.possible();
        let complaints = std::mem::replace(&mut self.complaints, Complaints::about(""));
        *self = Self { complaints, ..Self::new(present, possible) };
        present
    }

    fn cpu(&mut self, index: u32) -> Option<&mut Cpu> {
        self.cpus.get_mut(usize::try_from(index).ok()?)
    }

    fn selected(&self) -> Option<Cpu> {
        self.cpus.get(usize::try_from(self.selected).ok()?).copied()
    }

    fn next(&self) -> u32 {
        let mut all = (0..).zip(&self.cpus);
        all.find(|(_, cpu)| cpu.came || cpu.is_to_go).map_or(NONE, |(index, _)| index)
    }

    /// What a guest reads by so many bytes at `offset`.
    pub(super) fn read(&self, offset: u64, len_bytes: usize) -> u32 {
        match (offset, len_bytes) {
            (SELECT, 4) => self.selected,
            (STATUS, 4) => self.selected().map_or(0, |cpu| {
                let bit = |set, bit| if set { bit } else { 0 };
                bit(cpu.is_there(), IS_THERE) | bit(cpu.came, CAME) | bit(cpu.is_to_go, IS_TO_GO)
            }),
            (NEXT, 4) => self.next(),
            (POSSIBLE, 4) => self.possible(),
            _ => 0,
        }
    }

    /// Takes what a guest writes; whether there is news now.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            self.complaints.log(format_args!("{} bytes are written at {offset:#x}", data.len()));
            return false;
        };
        match offset {
            SELECT => self.selected = value,
            STATUS => self.act(value),
            OST_EVENT => self.ost_event = value,
            OST_OUTCOME => self.hear(value),
            _ => self.complaints.log(format_args!("{value:#x} is written at {offset:#x}")),
        }
        !self.news.is_empty()
    }

    fn act(&mut self, bits: u32) {
        let index = self.selected;
        let Some(cpu) = self.cpu(index) else {
            return self.complaints.log(format_args!("there can't be a vCPU {index}"));
        };
        cpu.came &= bits & CAME == 0;
        cpu.is_to_go &= bits & IS_TO_GO == 0;
        if bits & EJECT == 0 {
            return;
        }
        if cpu.stage == Stage::Leaving {
            *cpu = Cpu { stage: Stage::Ejected, ..Cpu::ABSENT };
            self.news.push(News::Ejected(index));
        } else {
            self.complaints.log(format_args!("vCPU {index} is ejected, but is not to go"));
        }
    }

    /// Takes the outcome of an `_OST` of the selected vCPU.
    fn hear(&mut self, status: u32) {
        let (index, event) = (self.selected, self.ost_event);
        let Some(cpu) = self.cpu(index) else {
            return self.complaints.log(format_args!("there can't be a vCPU {index}"));
        };
        let (was_to_go, is_outcome) = match (cpu.stage, event) {
            (Stage::Arriving, ost::BUS_CHECK | ost::DEVICE_CHECK) => {
                (false, status != ost::INSERTION_PENDING)
            }
            // A success is told before the guest ejects it or after, and is none without that.
            (Stage::Leaving, ost::EJECT_REQUEST | ost::OWN_EJECTION) => {
                (true, !matches!(status, ost::SUCCESS | ost::EJECTION_PENDING))
            }
            _ => return,
        };
        if is_outcome {
            cpu.stage = Stage::Present;
            cpu.is_to_go &= !was_to_go;
            if status != ost::SUCCESS {
                self.news.push(News::Declined { index, was_to_go, status });
            }
        }
    }
}

#[cfg(test)]
mod tests;
