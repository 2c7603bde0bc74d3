//! The PCI hotplug registers as a pure state machine: what a guest reads and writes there, and how
//! far each slot is with what it was asked for.
//!
//! ```text
//!          added              asked to go             eject
//! Empty ----------> Present --------------> Leaving --------> Ejected
//!   ^                  ^                     |    |              |
//!   |                  `---- _OST: refused --'    |              |
//!   `--------- removed (or the guest is reset) ---'--------------'
//! ```
//!
//! All registers are 32 bits wide and take aligned accesses of that width; others read as zero and
//! write nothing. `SELECT` is the segment that the next four are about; the AML holds a mutex over
//! each sequence.
//!
//! ```text
//! 0x00 SELECT  rw  the segment
//! 0x04 UP      r   slots to look at, one bit each; cleared by reading
//! 0x08 DOWN    r   slots to give up, one bit each; cleared by reading
//! 0x0c EJECT   w   the number of the slot that was given up
//! 0x10 SLOT    w   the number of the slot that a status is about
//! 0x14 EVENT   w   the notification that the status answers
//! 0x18 STATUS  w   the status (ACPI 6.5, section 6.3.5)
//! ```

use crate::{
    acpi::ost::{DEVICE_CHECK, EJECT_REQUEST, EJECTION_PENDING, OWN_EJECTION, SUCCESS},
    pci::{PciAddress, Slot, slot::SLOT_COUNT},
};

pub(super) const SELECT: u64 = 0x00;
pub(super) const UP: u64 = 0x04;
pub(super) const DOWN: u64 = 0x08;
pub(super) const EJECT: u64 = 0x0c;
pub(super) const STATUS_SLOT: u64 = 0x10;
pub(super) const STATUS_EVENT: u64 = 0x14;
pub(super) const STATUS: u64 = 0x18;

/// What an access asks of the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// The guest gave up what is there, as it was asked to.
    Ejected(PciAddress),
    /// The guest will not give up what is there.
    Kept(PciAddress, u32),
    /// The guest can't use what was added.
    Unusable(PciAddress, u32),
    /// It makes no sense: worth a line in the log.
    Refused(&'static str),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Occupancy {
    #[default]
    Empty,
    Present,
    Leaving,
    Ejected,
}

#[derive(Clone, Debug, Default)]
struct Segment {
    up: u32,
    down: u32,
    slots: [Occupancy; SLOT_COUNT as usize],
}

/// The registers of all segments.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    segments: Vec<Segment>,
    selected: u32,
    status_slot: u32,
    status_event: u32,
}

impl Registers {
    /// Every slot is empty.
    pub(super) fn new(segments: usize) -> Self {
        let segments = vec![Segment::default(); segments];
        Self { segments, selected: 0, status_slot: 0, status_event: 0 }
    }

    /// Something is at `address` from the start.
    pub(super) fn is_there(&mut self, address: PciAddress) {
        if let Some((_segment, slot)) = self.at(address) {
            *slot = Occupancy::Present;
        }
    }

    /// Something was put at `address`: the guest is to look.
    pub(super) fn added(&mut self, address: PciAddress) {
        self.is_there(address);
        if let Some(segment) = self.segments.get_mut(usize::from(address.segment)) {
            segment.up |= bit(address.slot);
        }
    }

    /// The guest is to give up what is at `address`. False if it was asked already, or nothing is
    /// there.
    pub(super) fn ask_for(&mut self, address: PciAddress) -> bool {
        let Some((segment, slot)) = self.at(address) else { return false };
        let asked = *slot == Occupancy::Present;
        if asked {
            *slot = Occupancy::Leaving;
            *segment |= bit(address.slot);
        }
        asked
    }

    /// What was at `address` is gone.
    pub(super) fn removed(&mut self, address: PciAddress) {
        if let Some((_down, slot)) = self.at(address) {
            *slot = Occupancy::Empty;
        }
        if let Some(segment) = self.segments.get_mut(usize::from(address.segment)) {
            segment.up &= !bit(address.slot);
            segment.down &= !bit(address.slot);
        }
    }

    /// Whether the guest was asked for what is at `address`, and it is still there.
    pub(super) fn is_leaving(&self, address: PciAddress) -> bool {
        matches!(self.occupancy(address), Occupancy::Leaving | Occupancy::Ejected)
    }

    /// Whether the guest gave up what is at `address`.
    pub(super) fn is_ejected(&self, address: PciAddress) -> bool {
        self.occupancy(address) == Occupancy::Ejected
    }

    /// As after power-on: a guest that boots finds what is there by itself.
    pub(super) fn reset(&mut self) {
        for segment in &mut self.segments {
            (segment.up, segment.down) = (0, 0);
        }
        (self.selected, self.status_slot, self.status_event) = (0, 0, 0);
    }

    /// The guest reads.
    pub(super) fn read(&mut self, offset: u64) -> u32 {
        let selected = self.selected;
        let segment =
            usize::try_from(selected).ok().and_then(|number| self.segments.get_mut(number));
        match (offset, segment) {
            (SELECT, _) => selected,
            (UP, Some(segment)) => std::mem::take(&mut segment.up),
            (DOWN, Some(segment)) => std::mem::take(&mut segment.down),
            _ => 0,
        }
    }

    /// The guest writes.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Effect {
        match offset {
            SELECT => self.selected = value,
            STATUS_SLOT => self.status_slot = value,
            STATUS_EVENT => self.status_event = value,
            EJECT => return self.eject(value),
            STATUS => return self.status(value),
            _ => {}
        }
        Effect::None
    }

    fn eject(&mut self, number: u32) -> Effect {
        let Some(address) = self.selected(number) else {
            return Effect::Refused("ejects what can't be there");
        };
        match self.at(address) {
            Some((down, slot)) if *slot == Occupancy::Leaving => {
                *slot = Occupancy::Ejected;
                *down &= !bit(address.slot);
                Effect::Ejected(address)
            }
            // It may give up a device for itself; that is none of the machine's business.
            _ => Effect::Refused("ejects what it was not asked for"),
        }
    }

    fn status(&mut self, status: u32) -> Effect {
        let event = self.status_event;
        let Some(address) = self.selected(self.status_slot) else {
            return Effect::Refused("has a status of what can't be there");
        };
        if status == SUCCESS || status == EJECTION_PENDING {
            return Effect::None;
        }
        let occupancy = self.occupancy(address);
        if event == DEVICE_CHECK && occupancy == Occupancy::Present {
            return Effect::Unusable(address, status);
        }
        let about_ejection = event == EJECT_REQUEST || event == OWN_EJECTION;
        match self.at(address) {
            Some((down, slot)) if about_ejection && *slot == Occupancy::Leaving => {
                *slot = Occupancy::Present;
                *down &= !bit(address.slot);
                Effect::Kept(address, status)
            }
            _ => Effect::None,
        }
    }

    /// What `number` is on the selected segment.
    fn selected(&self, number: u32) -> Option<PciAddress> {
        let slot = u8::try_from(number).ok().and_then(Slot::new)?;
        let segment = u16::try_from(self.selected).ok()?;
        (usize::from(segment) < self.segments.len()).then_some(PciAddress { segment, slot })
    }

    fn occupancy(&self, address: PciAddress) -> Occupancy {
        let segment = self.segments.get(usize::from(address.segment));
        segment.map_or(Occupancy::Empty, |segment| segment.slots[address.slot.index()])
    }

    /// The bits of the slots to give up, and the slot.
    fn at(&mut self, address: PciAddress) -> Option<(&mut u32, &mut Occupancy)> {
        let segment = self.segments.get_mut(usize::from(address.segment))?;
        Some((&mut segment.down, &mut segment.slots[address.slot.index()]))
    }
}

fn bit(slot: Slot) -> u32 {
    1 << slot.number()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn at(segment: u16, slot: u8) -> PciAddress {
        PciAddress { segment, slot: Slot::new(slot).unwrap() }
    }

    fn write(registers: &mut Registers, offset: u64, value: u32) {
        assert_eq!(registers.write(offset, value), Effect::None);
    }

    fn say(registers: &mut Registers, slot: u32, event: u32, status: u32) -> Effect {
        write(registers, STATUS_SLOT, slot);
        write(registers, STATUS_EVENT, event);
        registers.write(STATUS, status)
    }

    #[test]
    fn what_was_added_is_told_once_and_in_its_segment() {
        let mut registers = Registers::new(2);
        registers.is_there(at(0, 1));
        registers.added(at(0, 3));
        registers.added(at(1, 1));
        assert_eq!((registers.read(UP), registers.read(UP)), (1 << 3, 0));
        write(&mut registers, SELECT, 1);
        assert_eq!(registers.read(SELECT), 1);
        assert_eq!((registers.read(DOWN), registers.read(UP), registers.read(UP)), (0, 2, 0));
        for beyond in [2, u32::MAX] {
            write(&mut registers, SELECT, beyond);
            assert_eq!((registers.read(UP), registers.read(DOWN)), (0, 0));
            assert!(matches!(registers.write(EJECT, 1), Effect::Refused(_)));
        }
    }

    #[test]
    fn only_what_the_guest_was_asked_for_can_be_ejected_and_only_once() {
        let mut registers = Registers::new(2);
        registers.is_there(at(0, 1));
        registers.is_there(at(1, 1));
        assert!(matches!(registers.write(EJECT, 1), Effect::Refused(_)), "it was not asked");
        assert!(registers.ask_for(at(1, 1)));
        assert!(!registers.ask_for(at(1, 1)), "it was asked already");
        assert!(!registers.ask_for(at(1, 2)), "nothing is there");
        assert!(registers.is_leaving(at(1, 1)) && !registers.is_leaving(at(0, 1)));
        assert!(matches!(registers.write(EJECT, 1), Effect::Refused(_)), "another segment");
        write(&mut registers, SELECT, 1);
        assert_eq!((registers.read(DOWN), registers.read(DOWN)), (2, 0));
        for number in [0, 2, 32, u32::MAX] {
            assert!(matches!(registers.write(EJECT, number), Effect::Refused(_)));
        }
        assert_eq!(registers.write(EJECT, 1), Effect::Ejected(at(1, 1)));
        assert!(registers.is_ejected(at(1, 1)) && registers.is_leaving(at(1, 1)));
        assert!(matches!(registers.write(EJECT, 1), Effect::Refused(_)));
        registers.removed(at(1, 1));
        assert!(!registers.is_leaving(at(1, 1)));
        registers.added(at(1, 1));
        assert_eq!(registers.read(UP), 2);
    }

    #[test]
    fn a_guest_that_refuses_keeps_what_is_there_and_can_be_asked_again() {
        let mut registers = Registers::new(1);
        registers.is_there(at(0, 4));
        assert_eq!(say(&mut registers, 4, 3, 0x81), Effect::None, "nobody asked");
        assert!(registers.ask_for(at(0, 4)));
        for (event, status) in [(3, 0), (3, 0x84), (0x103, 0x84), (1, 1), (0x80, 1)] {
            assert_eq!(say(&mut registers, 4, event, status), Effect::None, "{event} {status}");
        }
        assert!(registers.is_leaving(at(0, 4)));
        assert_eq!(say(&mut registers, 4, 3, 0x82), Effect::Kept(at(0, 4), 0x82));
        assert_eq!(registers.read(DOWN), 0, "it is no longer asked for");
        assert!(registers.ask_for(at(0, 4)));
        assert_eq!(say(&mut registers, 4, 0x103, 1), Effect::Kept(at(0, 4), 1));
        assert_eq!(say(&mut registers, 4, 1, 0x81), Effect::Unusable(at(0, 4), 0x81));
        assert!(matches!(say(&mut registers, 77, 3, 1), Effect::Refused(_)));
    }

    #[test]
    fn a_status_after_the_eject_changes_nothing() {
        let mut registers = Registers::new(1);
        registers.is_there(at(0, 4));
        assert!(registers.ask_for(at(0, 4)));
        assert_eq!(registers.write(EJECT, 4), Effect::Ejected(at(0, 4)));
        assert_eq!(say(&mut registers, 4, 3, 1), Effect::None);
        assert!(registers.is_ejected(at(0, 4)));
    }

    #[test]
    fn a_reset_forgets_what_the_guest_was_not_yet_told() {
        let mut registers = Registers::new(2);
        registers.added(at(1, 9));
        registers.is_there(at(1, 1));
        assert!(registers.ask_for(at(1, 1)));
        write(&mut registers, SELECT, 1);
        registers.reset();
        assert_eq!(registers.read(SELECT), 0);
        write(&mut registers, SELECT, 1);
        assert_eq!((registers.read(UP), registers.read(DOWN)), (0, 0));
        assert!(registers.is_leaving(at(1, 1)), "until it is removed");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Read(u64),
        Write(u64, u32),
        Add(u8),
        Ask(u8),
        Remove(u8),
        Reset,
    }

    fn step() -> impl Strategy<Value = Step> {
        let value = prop_oneof![0_u32..40, Just(0x81), Just(0x103), any::<u32>()];
        prop_oneof![
            (0_u64..10).prop_map(|register| Step::Read(register * 4)),
            (0_u64..10, value).prop_map(|(register, value)| Step::Write(register * 4, value)),
            (1_u8..32).prop_map(Step::Add),
            (1_u8..32).prop_map(Step::Ask),
            (1_u8..32).prop_map(Step::Remove),
            Just(Step::Reset),
        ]
    }

    proptest! {
        /// The owner adds to empty slots and removes as it likes; the guest does anything at all.
        #[test]
        fn a_guest_ejects_and_keeps_what_it_was_asked_for_and_nothing_else(
            steps in vec(step(), 1..300),
        ) {
            let mut registers = Registers::new(1);
            let (mut present, mut asked) = (0_u32, 0_u32);
            for step in steps {
                match step {
                    Step::Read(offset) => {
                        let bits = registers.read(offset);
                        match offset {
                            UP => prop_assert_eq!(bits & !present, 0),
                            DOWN => prop_assert_eq!(bits & !asked, 0),
                            _ => {}
                        }
                    }
                    Step::Write(offset, value) => match registers.write(offset, value) {
                        Effect::Ejected(address) | Effect::Kept(address, _) => {
                            prop_assert!(asked & bit(address.slot) != 0);
                            asked &= !bit(address.slot);
                        }
                        Effect::Unusable(address, _) => {
                            prop_assert!(present & bit(address.slot) != 0);
                        }
                        Effect::None | Effect::Refused(_) => {}
                    },
                    Step::Add(slot) if present & 1 << slot == 0 => {
                        registers.added(at(0, slot));
                        present |= 1 << slot;
                    }
                    Step::Ask(slot) => {
                        if registers.ask_for(at(0, slot)) {
                            prop_assert!(present & 1 << slot != 0 && asked & 1 << slot == 0);
                            asked |= 1 << slot;
                        }
                    }
                    Step::Remove(slot) => {
                        registers.removed(at(0, slot));
                        (present, asked) = (present & !(1 << slot), asked & !(1 << slot));
                    }
                    Step::Reset => registers.reset(),
                    Step::Add(_) => {}
                }
            }
        }
    }
}
