//! A device's memory BARs: what they are, and which parts of them a guest may reach without a trap.
//!
//! Pure. A BAR's kind comes from its register, its size from VFIO; the two were made by the
//! device, so both are checked. Everything in a BAR is reached by trapped reads and writes, except
//! for the parts that VFIO lets map and that hold neither the MSI-X table nor the pending bits:
//! what a guest wrote there would reach the device's interrupts unseen.

/// BARs in a type 0 header.
pub const BAR_COUNT: usize = 6;
/// What can be mapped at once.
pub const PAGE_BYTES: u64 = 4096;
/// The shortest memory BAR (PCI Local Bus 3.0, section 6.2.5.1).
const SHORTEST_BYTES: u64 = 16;

const IO_SPACE: u32 = 1;
const KIND: u32 = 0b110;
const KIND_64_BITS: u32 = 0b100;
const PREFETCHABLE: u32 = 0b1000;

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Which; of a 64-bit one the lower.
    pub index: u8,
    /// A power of two.
    pub len_bytes: u64,
    /// Whether it takes two registers.
    pub is_64_bits: bool,
    /// Whether reads have no effects.
    pub is_prefetchable: bool,
}

/// A part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len_bytes: u64,
}

impl Area {
    fn end(self) -> u64 {
        self.offset.saturating_add(self.len_bytes)
    }

    /// Whether `offset` lies in it.
    #[must_use]
    pub fn contains(self, offset: u64) -> bool {
        offset >= self.offset && offset < self.end()
    }
}

/// The memory BARs of a device with these registers and region sizes. I/O BARs are left out, as is
/// what makes no sense.
#[must_use]
pub fn bars(registers: [u32; BAR_COUNT], sizes: [u64; BAR_COUNT]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut index = 0;
    while index < BAR_COUNT {
        let register = registers[index];
        let is_64_bits = register & KIND == KIND_64_BITS && register & IO_SPACE == 0;
        let number = u8::try_from(index).unwrap_or(u8::MAX);
        let fits = if is_64_bits { index + 1 < BAR_COUNT } else { sizes[index] <= 1 << 31 };
        let len_bytes = sizes[index].max(SHORTEST_BYTES).checked_next_power_of_two();
        if let Some(len_bytes) = len_bytes
            && sizes[index] > 0
            && register & IO_SPACE == 0
            && fits
        {
            let is_prefetchable = register & PREFETCHABLE != 0;
            bars.push(Bar { index: number, len_bytes, is_64_bits, is_prefetchable });
        }
        index += if is_64_bits { 2 } else { 1 };
    }
    bars
}

/// What of `mappable` can be mapped in whole pages when `trapped` must not be. `region_bytes` is
/// where the region ends.
#[must_use]
pub fn mapped_areas(region_bytes: u64, mappable: &[Area], trapped: &[Area]) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for area in mappable {
        let start = area.offset.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
        let end = area.end().min(region_bytes) / PAGE_BYTES * PAGE_BYTES;
        // What an earlier one has is not mapped twice.
        let taken: Vec<Area> = areas.iter().chain(trapped).copied().collect();
        areas.extend(without(start..end, &taken));
    }
    areas.sort_by_key(|area| area.offset);
    areas
}

/// The parts of `range` whose pages `taken` does not touch.
fn without(range: std::ops::Range<u64>, taken: &[Area]) -> Vec<Area> {
    let mut holes: Vec<_> = taken
        .iter()
        .filter(|area| area.len_bytes > 0)
        .map(|area| {
            let start = area.offset / PAGE_BYTES * PAGE_BYTES;
            let end = area.end().checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
            start..end
        })
        .collect();
    holes.sort_by_key(|hole| hole.start);
    let mut parts = Vec::new();
    let mut at = range.start;
    for hole in holes {
        if hole.start > at && at < range.end {
            let end = hole.start.min(range.end);
            parts.push(Area { offset: at, len_bytes: end - at });
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        parts.push(Area { offset: at, len_bytes: range.end - at });
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn area(offset: u64, len_bytes: u64) -> Area {
        Area { offset, len_bytes }
    }

    #[test]
    fn kinds_come_from_the_registers_and_sizes_from_vfio() {
        let registers = [0xfe00_000c, 0x1, 0xfd00_0000, 0xe001, 0x4, 0];
        let sizes = [16 << 30, 0, 0x2000, 32, 0x1800, 0];
        let bars = bars(registers, sizes);
        assert_eq!(
            bars,
            [
                Bar { index: 0, len_bytes: 16 << 30, is_64_bits: true, is_prefetchable: true },
                Bar { index: 2, len_bytes: 0x2000, is_64_bits: false, is_prefetchable: false },
                Bar { index: 4, len_bytes: 0x2000, is_64_bits: true, is_prefetchable: false },
            ]
        );
    }

    #[test]
    fn a_bar_that_does_not_fit_is_left_out() {
        assert!(bars([0, 0, 0, 0, 0, 4], [0, 0, 0, 0, 0, 4096]).is_empty(), "no upper register");
        assert!(bars([0; 6], [1 << 32, 0, 0, 0, 0, 0]).is_empty(), "32 bits");
        assert!(bars([4, 0, 0, 0, 0, 0], [u64::MAX, 0, 0, 0, 0, 0]).is_empty());
        assert_eq!(bars([0; 6], [4, 0, 0, 0, 0, 0])[0].len_bytes, 16);
    }

    #[test]
    fn the_table_s_page_is_cut_out_of_a_mapped_bar() {
        let whole = [area(0, 0x4000)];
        let areas = mapped_areas(0x4000, &whole, &[area(0x2000, 0x410), area(0x3000, 9)]);
        assert_eq!(areas, [area(0, 0x2000)]);
        let areas = mapped_areas(0x4000, &whole, &[area(0x1ff8, 16)]);
        assert_eq!(areas, [area(0, 0x1000), area(0x3000, 0x1000)]);
    }

    #[test]
    fn a_bar_shorter_than_a_page_is_not_mapped() {
        assert!(mapped_areas(0x800, &[area(0, 0x800)], &[]).is_empty());
        assert!(mapped_areas(0x1000, &[], &[]).is_empty());
    }

    proptest! {
        #[test]
        fn areas_are_pages_inside_what_may_be_mapped_and_touch_no_trap(
            region in 0_u64..0x2_0000,
            mappable in vec((0_u64..0x2_0000, 0_u64..0x2_0000), 0..4),
            trapped in vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..4),
        ) {
            let mappable: Vec<_> = mappable.into_iter().map(|(at, len)| area(at, len)).collect();
            let trapped: Vec<_> = trapped
                .into_iter()
                .map(|(at, len, wild)| if wild { area(at, len) } else {
                    area(at % 0x2_0000, len % 0x2000)
                })
                .collect();
            let areas = mapped_areas(region, &mappable, &trapped);
            let pages = |area: &Area| (area.offset..area.end()).step_by(4096);
            let mapped: Vec<u64> = areas.iter().flat_map(pages).collect();
            prop_assert!(areas.iter().all(|area| area.len_bytes > 0));
            for page in (0..0x2_0000).step_by(4096) {
                let inside = page + 4096 <= region && mappable.iter().any(|area| {
                    area.offset <= page && area.end() >= page + 4096
                });
                let clear = trapped.iter().all(|area| {
                    area.len_bytes == 0 || area.offset >= page + 4096 || area.end() <= page
                });
                let count = mapped.iter().filter(|other| **other == page).count();
                prop_assert_eq!(count, usize::from(inside && clear), "page {:#x}", page);
            }
            prop_assert!(mapped.iter().all(|page| page % 4096 == 0 && *page < 0x2_0000));
        }
    }
}
