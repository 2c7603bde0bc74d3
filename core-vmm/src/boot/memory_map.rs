//! The memory map that the guest is told, in the numbers that E820 and PVH share.

use std::ops::Range;

use crate::memory::layout::{self, Ram};

/// What a range of physical addresses is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Free for the guest.
    Ram = 1,
    /// Not RAM, and not to be given to devices.
    Reserved = 2,
}

/// The map, in address order.
pub(super) fn entries(ram: &Ram) -> Vec<(Range<u64>, Kind)> {
    let mut map = vec![
        (0..layout::LOW_MEMORY_END, Kind::Ram),
        (layout::FIRMWARE, Kind::Reserved),
        (layout::KERNEL_START..ram.low.end, Kind::Ram),
        // Linux uses no ECAM that is not told as reserved.
        (layout::ECAM, Kind::Reserved),
        (layout::FURTHER_ECAMS, Kind::Reserved),
        (layout::KVM_PAGES, Kind::Reserved),
        (ram.high.clone(), Kind::Ram),
    ];
    map.retain(|(range, _kind)| !range.is_empty());
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_in_order_and_covers_all_ram_but_the_legacy_area() {
        for bytes in [2 << 20, 512 << 20, 8 << 30] {
            let ram = Ram::of(bytes);
            let map = entries(&ram);
            assert!(map.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start));
            let usable: u64 = map
                .iter()
                .filter(|(_range, kind)| *kind == Kind::Ram)
                .map(|(range, _kind)| range.end - range.start)
                .sum();
            assert_eq!(usable, bytes - (layout::KERNEL_START - layout::LOW_MEMORY_END));
        }
    }
}
