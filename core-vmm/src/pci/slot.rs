//! Slots: which of a bus's 32 device numbers are taken.
//!
//! A slot is named by [`Slot`] alone; which segment's bus it is on says
//! [`PciAddress`](super::PciAddress).

/// Device numbers on a bus (PCI Local Bus 3.0, section 3.2.2.3.2: five bits).
pub const SLOT_COUNT: u8 = 32;

/// A device number on the bus, below [`SLOT_COUNT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u8);

impl Slot {
    /// The slot of the host bridge.
    pub const HOST_BRIDGE: Self = Self(0);

    /// The slot with this number, if there is one.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        (number < SLOT_COUNT).then_some(Self(number))
    }

    /// The device number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }

    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Hands out slots, the lowest free one first, so that boot devices keep their addresses.
#[derive(Debug, Default)]
pub struct SlotAllocator {
    /// Bit n: slot n is taken.
    taken: u32,
}

impl SlotAllocator {
    /// Takes the lowest free slot.
    pub fn allocate(&mut self) -> Option<Slot> {
        let slot = (0..SLOT_COUNT).map(Slot).find(|slot| !self.is_taken(*slot))?;
        self.taken |= 1 << slot.0;
        Some(slot)
    }

    /// Takes `slot`; false if it was taken already.
    pub fn reserve(&mut self, slot: Slot) -> bool {
        let free = !self.is_taken(slot);
        self.taken |= 1 << slot.0;
        free
    }

    /// Gives `slot` back; false if it was free already.
    pub fn release(&mut self, slot: Slot) -> bool {
        let taken = self.is_taken(slot);
        self.taken &= !(1 << slot.0);
        taken
    }

    /// Whether `slot` is taken.
    #[must_use]
    pub fn is_taken(&self, slot: Slot) -> bool {
        self.taken & (1 << slot.0) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_slot_is_handed_out_and_a_released_one_again() {
        let mut slots = SlotAllocator::default();
        assert!(slots.reserve(Slot::HOST_BRIDGE));
        assert!(!slots.reserve(Slot::HOST_BRIDGE));
        assert_eq!(slots.allocate(), Slot::new(1));
        assert_eq!(slots.allocate(), Slot::new(2));
        assert!(slots.release(Slot(1)));
        assert!(!slots.release(Slot(1)));
        assert_eq!(slots.allocate(), Slot::new(1));
        assert_eq!(slots.allocate(), Slot::new(3));
    }

    #[test]
    fn there_are_thirty_two_slots() {
        let mut slots = SlotAllocator::default();
        let all: Vec<Slot> = std::iter::from_fn(|| slots.allocate()).collect();
        assert_eq!(all.len(), 32);
        assert_eq!(slots.allocate(), None);
        assert_eq!(Slot::new(32), None);
    }
}
