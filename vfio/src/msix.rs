//! Where a device's MSI-X table and pending bits are (PCI Local Bus 3.0, section 6.8.2).

use crate::bar::{Area, BAR_COUNT};

/// Bytes of a table entry.
const ENTRY_BYTES: u64 = 16;

/// The MSI-X capability's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Entries, 1 to 2048.
    pub vectors: u16,
    /// The BAR that has the table.
    pub table_bar: u8,
    /// Where the table is in it.
    pub table: Area,
    /// The BAR that has the pending bits.
    pub pending_bar: u8,
    /// Where they are in it.
    pub pending: Area,
}

impl MsixLayout {
    /// From the capability's 12 bytes; none if it names BARs that can't be.
    #[must_use]
    pub fn parse(capability: &[u8; 12]) -> Option<Self> {
        let word = |at: usize| {
            capability[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let control = u16::from_le_bytes([capability[2], capability[3]]);
        let vectors = (control & 0x7ff) + 1;
        let place = |word: u32| {
            let bar = u8::try_from(word & 7).ok()?;
            (usize::from(bar) < BAR_COUNT).then_some((bar, u64::from(word & !7)))
        };
        let (table_bar, table) = place(word(4))?;
        let (pending_bar, pending) = place(word(8))?;
        let table = Area { offset: table, len_bytes: u64::from(vectors) * ENTRY_BYTES };
        // Whole words of 64 bits.
        let len_bytes = u64::from(vectors.div_ceil(64)) * 8;
        let pending = Area { offset: pending, len_bytes };
        Some(Self { vectors, table_bar, table, pending_bar, pending })
    }

    /// What of BAR `index` a guest may not reach by itself.
    #[must_use]
    pub fn trapped(&self, index: u8) -> Vec<Area> {
        let parts = [(self.table_bar, self.table), (self.pending_bar, self.pending)];
        parts.into_iter().filter(|(bar, _area)| *bar == index).map(|(_bar, area)| area).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_and_the_pending_bits_are_where_the_capability_says() {
        let capability = [0x11, 0, 64, 0x80, 0, 0x20, 0, 0, 4, 0x30, 0, 0];
        let layout = MsixLayout::parse(&capability).unwrap();
        assert_eq!((layout.vectors, layout.table_bar, layout.pending_bar), (65, 0, 4));
        assert_eq!(layout.table, Area { offset: 0x2000, len_bytes: 65 * 16 });
        assert_eq!(layout.pending, Area { offset: 0x3000, len_bytes: 16 });
        assert_eq!(layout.trapped(4), [layout.pending]);
        assert!(layout.trapped(2).is_empty());
    }

    #[test]
    fn a_capability_with_a_seventh_bar_is_none() {
        assert_eq!(MsixLayout::parse(&[0x11, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
