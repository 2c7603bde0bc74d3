//! Base address registers: what a function wants mapped, and where in the windows it goes.
//!
//! The registers themselves live in [`config_space`](super::config_space); here are the sizes, and
//! the allocator that places them before the guest runs. A guest may move them afterwards.

/// Which of a function's BARs; a 64-bit one is named by its lower register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(u8);

/// BARs in a type 0 header (PCI Local Bus 3.0, section 6.2.5.1).
pub const BAR_COUNT: u8 = 6;

impl BarIndex {
    /// The first BAR.
    pub const ZERO: Self = Self(0);

    /// The BAR with this number, if there is one.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        (number < BAR_COUNT).then_some(Self(number))
    }

    /// The number of the (lower) register.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }

    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// How many address bits a BAR has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarWidth {
    /// One register: the BAR lies below 4 GiB.
    Bits32,
    /// Two registers: the BAR may lie anywhere.
    Bits64,
}

/// A memory BAR that a function has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// Which one.
    pub index: BarIndex,
    /// A power of two, at least 16 (PCI Local Bus 3.0, section 6.2.5.1).
    pub len_bytes: u64,
    /// 32 or 64 address bits.
    pub width: BarWidth,
    /// Reads have no effect and writes may be merged.
    pub prefetchable: bool,
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// First address.
    pub start: u64,
    /// Bytes; `start + len_bytes` does not wrap.
    pub len_bytes: u64,
}

impl AddressRange {
    /// The first address after the range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start.saturating_add(self.len_bytes)
    }

    /// Whether all of `other` lies in here.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        other.start >= self.start && other.end() <= self.end()
    }

    /// Whether the two share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Places BARs in one window, each aligned to its own length.
#[derive(Debug)]
pub struct WindowAllocator {
    window: AddressRange,
    /// Sorted by address, disjoint, inside the window.
    taken: Vec<AddressRange>,
}

impl WindowAllocator {
    /// An empty window.
    #[must_use]
    pub fn new(window: AddressRange) -> Self {
        Self { window, taken: Vec::new() }
    }

    /// Takes the lowest free range of `len_bytes`, a power of two, aligned to its length.
    pub fn allocate(&mut self, len_bytes: u64) -> Option<AddressRange> {
        let mut start = align_up(self.window.start, len_bytes)?;
        let mut at = 0;
        for range in &self.taken {
            if start.checked_add(len_bytes)? <= range.start {
                break;
            }
            start = start.max(align_up(range.end(), len_bytes)?);
            at += 1;
        }
        start.checked_add(len_bytes).filter(|end| *end <= self.window.end())?;
        let range = AddressRange { start, len_bytes };
        self.taken.insert(at, range);
        Some(range)
    }

    /// Gives back a range that was allocated; false if it was not.
    pub fn release(&mut self, range: AddressRange) -> bool {
        let before = self.taken.len();
        self.taken.retain(|taken| *taken != range);
        self.taken.len() < before
    }
}

fn align_up(address: u64, alignment: u64) -> Option<u64> {
    debug_assert!(alignment.is_power_of_two(), "BARs are sized in powers of two");
    address.checked_next_multiple_of(alignment)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const WINDOW: AddressRange = AddressRange { start: 0xc000_1000, len_bytes: 0x1_0000 };

    #[test]
    fn a_range_is_aligned_to_its_length_and_the_gap_is_used_later() {
        let mut window = WindowAllocator::new(WINDOW);
        assert_eq!(window.allocate(0x4000).unwrap().start, 0xc000_4000);
        assert_eq!(window.allocate(0x1000).unwrap().start, 0xc000_1000);
        assert_eq!(window.allocate(0x2000).unwrap().start, 0xc000_2000);
        assert_eq!(window.allocate(0x8000).unwrap().start, 0xc000_8000);
        assert_eq!(window.allocate(0x8000), None);
    }

    #[test]
    fn a_window_at_the_end_of_the_address_space_does_not_wrap() {
        let start = u64::MAX - 0xffff;
        let mut window = WindowAllocator::new(AddressRange { start, len_bytes: 0xffff });
        assert_eq!(window.allocate(1 << 63), None);
        assert!(window.allocate(0x8000).is_some());
        assert_eq!(window.allocate(0x8000), None);
    }

    proptest! {
        #[test]
        fn ranges_are_aligned_disjoint_and_inside_and_come_back(
            steps in vec((any::<bool>(), 4_u32..14, any::<prop::sample::Index>()), 1..80),
        ) {
            let mut window = WindowAllocator::new(WINDOW);
            let mut held: Vec<AddressRange> = Vec::new();
            for (give_back, log2, which) in steps {
                if give_back && !held.is_empty() {
                    let range = held.swap_remove(which.index(held.len()));
                    prop_assert!(window.release(range));
                    prop_assert!(!window.release(range));
                    continue;
                }
                let Some(range) = window.allocate(1 << log2) else { continue };
                prop_assert_eq!(range.start % range.len_bytes, 0);
                prop_assert!(WINDOW.contains(range));
                prop_assert!(held.iter().all(|other| !other.overlaps(range)));
                held.push(range);
            }
        }
    }
}
