//! Where RAM goes that is plugged into a running guest, and which of it comes and goes when the
//! guest is to have another amount. Arithmetic only.
//!
//! ```text
//! 4 GiB .. boot RAM's end | up to a multiple of a unit | unit 0 | unit 1 | ... | unit n-1
//! ```
//!
//! A unit is the least that is plugged, and the most that goes in one piece: one ACPI memory device,
//! one region of each backend, one slot of KVM. All have one size and a fixed place each, so every
//! amount in steps of a unit can be reached up and down, whatever the guest gives back and in which
//! order. The price is a limit, [`MAX_UNITS`], behind which units are larger than 128 MiB.

use std::ops::Range;

use nacre_proto::vmm::MEMORY_STEP_BYTES;

use super::layout::{HIGH_RAM_START, Ram, pci_window_64};

/// The most units of a VM. A backend has 509 regions at most, and the ACPI tables have to have room
/// for a device each.
pub const MAX_UNITS: u32 = 256;

/// From here on Linux takes larger blocks of memory than 128 MiB, up to [`MAX_BLOCK_BYTES`]: the
/// largest that boot RAM's end is a multiple of (`probe_memory_block_size` in arch/x86/mm/init_64.c
/// of Linux 6.12). It takes no unit that is not made of whole blocks.
const LARGE_BLOCKS_FROM: u64 = 64 << 30;
/// The largest of them.
const MAX_BLOCK_BYTES: u64 = 2 << 30;

/// Why no such VM can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Less than boot RAM.
    #[error("--max-memory of {max_bytes} bytes is less than --memory of {boot_bytes} bytes")]
    BelowBoot {
        /// As asked.
        max_bytes: u64,
        /// What the VM begins with.
        boot_bytes: u64,
    },
    /// Behind what the guest can address.
    #[error(
        "--max-memory of {max_bytes} bytes ends at {end:#x}, above {limit:#x}, which is where RAM ends for a guest with {address_bits} address bits"
    )]
    BeyondWidth {
        /// As asked.
        max_bytes: u64,
        /// Where the last unit would end.
        end: u64,
        /// Where it has to end.
        limit: u64,
        /// The guest's physical address width.
        address_bits: u32,
    },
}

/// Which units a VM can have. They are numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    boot_bytes: u64,
    start: u64,
    unit_bytes: u64,
    units: u32,
}

/// What makes one amount of RAM another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These units are to come, in this order.
    Plug(Vec<u32>),
    /// These units are to go, in this order.
    Unplug(Vec<u32>),
}

impl Plan {
    /// For a VM that begins with `ram` and may have up to `max_bytes`. What is left of that after
    /// the last whole unit is never used.
    ///
    /// # Errors
    ///
    /// Fails if that is less than it begins with, or more than it can address.
    pub fn new(ram: &Ram, max_bytes: u64, address_bits: u32) -> Result<Self, PlanError> {
        let boot_bytes = ram.ranges().map(|range| range.end - range.start).sum();
        let more_bytes = max_bytes
            .checked_sub(boot_bytes)
            .ok_or(PlanError::BelowBoot { max_bytes, boot_bytes })?;
        let limit = pci_window_64(address_bits).start;
        let beyond = |end| PlanError::BeyondWidth { max_bytes, end, limit, address_bits };
        let end = HIGH_RAM_START.max(ram.high.end);
        if more_bytes > limit.saturating_sub(end) {
            return Err(beyond(end.saturating_add(more_bytes)));
        }
        // Below the limit nothing overflows.
        let unit_bytes = unit_bytes(ram, more_bytes);
        let start = end.next_multiple_of(unit_bytes);
        let units = u32::try_from(more_bytes / unit_bytes).unwrap_or(MAX_UNITS);
        let plan = Self { boot_bytes, start, unit_bytes, units };
        let end = start + u64::from(units) * unit_bytes;
        if end > limit { Err(beyond(end)) } else { Ok(plan) }
    }

    /// How many units there can be.
    #[must_use]
    pub fn units(&self) -> u32 {
        self.units
    }

    /// The size of each.
    #[must_use]
    pub fn unit_bytes(&self) -> u64 {
        self.unit_bytes
    }

    /// Where a unit is in the guest.
    #[must_use]
    pub fn range(&self, unit: u32) -> Range<u64> {
        let start = self.start + u64::from(unit) * self.unit_bytes;
        start..start + self.unit_bytes
    }

    /// What the VM begins with.
    #[must_use]
    pub fn boot_bytes(&self) -> u64 {
        self.boot_bytes
    }

    /// How much RAM there is with so many units.
    #[must_use]
    pub fn bytes_with(&self, units: usize) -> u64 {
        self.boot_bytes + self.unit_bytes * units as u64
    }

    /// How much there can be.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.boot_bytes + self.unit_bytes * u64::from(self.units)
    }

    /// What makes the RAM with the units `present`, oldest first, into `bytes`, which are a whole
    /// number of units more than boot RAM and no more than the most. Units that are `held` can't
    /// come; it may be that fewer come than it takes.
    ///
    /// The newest go first: what a guest has used for longer is harder to give back.
    #[must_use]
    pub fn change(&self, present: &[u32], held: &[u32], bytes: u64) -> Change {
        let wanted = bytes.saturating_sub(self.boot_bytes) / self.unit_bytes;
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        if wanted < present.len() {
            return Change::Unplug(present[wanted..].iter().rev().copied().collect());
        }
        let is_absent = |unit: &u32| !present.contains(unit) && !held.contains(unit);
        let absent = (0..self.units).filter(is_absent);
        Change::Plug(absent.take(wanted - present.len()).collect())
    }
}

/// The size of a unit: a power of two from 128 MiB on.
fn unit_bytes(ram: &Ram, more_bytes: u64) -> u64 {
    let mut bytes = MEMORY_STEP_BYTES;
    let end = ram.high.end;
    if !ram.high.is_empty() && end >= LARGE_BLOCKS_FROM {
        bytes = (1_u64 << end.trailing_zeros().min(MAX_BLOCK_BYTES.trailing_zeros())).max(bytes);
    }
    while more_bytes / bytes > u64::from(MAX_UNITS) {
        bytes *= 2;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn plan(boot_bytes: u64, max_bytes: u64) -> Plan {
        Plan::new(&Ram::of(boot_bytes), max_bytes, 46).unwrap()
    }

    #[test]
    fn units_begin_at_a_multiple_of_128_mib_above_4_gib_and_boot_ram() {
        assert_eq!(plan(514 * MIB, GIB).range(0), 4 * GIB..4 * GIB + 128 * MIB);
        assert_eq!(plan(514 * MIB, GIB).units(), 3);
        assert_eq!(plan(514 * MIB, GIB).max_bytes(), 898 * MIB);
        let odd = plan(3 * GIB + 2 * MIB, 4 * GIB);
        assert_eq!(odd.range(0).start, 4 * GIB + 128 * MIB);
        assert_eq!(odd.range(6).end, 5 * GIB);
        assert_eq!(odd.units(), 7);
    }

    #[test]
    fn a_vm_without_room_for_more_has_no_units() {
        assert_eq!(plan(256 * MIB, 256 * MIB).units(), 0);
        assert_eq!(plan(256 * MIB, 300 * MIB).max_bytes(), 256 * MIB);
        let error = Plan::new(&Ram::of(GIB), GIB - 2 * MIB, 46).unwrap_err();
        assert!(matches!(error, PlanError::BelowBoot { .. }));
    }

    #[test]
    fn large_vms_have_larger_units_and_so_no_more_of_them() {
        assert_eq!(
            (plan(GIB, 33 * GIB).units(), plan(GIB, 33 * GIB).unit_bytes()),
            (256, 128 * MIB)
        );
        assert_eq!(
            (plan(GIB, 34 * GIB).units(), plan(GIB, 34 * GIB).unit_bytes()),
            (132, 256 * MIB)
        );
    }

    #[test]
    fn a_guest_that_takes_large_blocks_gets_units_of_whole_blocks() {
        // Boot RAM ends at 129 GiB and at 128.5 GiB.
        assert_eq!(plan(128 * GIB, 130 * GIB).unit_bytes(), GIB);
        assert_eq!(plan(128 * GIB - 512 * MIB, 130 * GIB).unit_bytes(), 512 * MIB);
        assert_eq!(plan(127 * GIB, 131 * GIB).unit_bytes(), 2 * GIB);
        assert_eq!(plan(127 * GIB + 2 * MIB, 131 * GIB).unit_bytes(), 128 * MIB);
    }

    #[test]
    fn what_the_guest_cannot_address_is_refused() {
        // RAM ends at 48 GiB.
        assert!(Plan::new(&Ram::of(GIB), 45 * GIB, 36).is_ok());
        for max_bytes in [45 * GIB + 128 * MIB, u64::MAX] {
            let error = Plan::new(&Ram::of(GIB), max_bytes, 36).unwrap_err();
            assert!(matches!(error, PlanError::BeyondWidth { .. }), "{error}");
        }
    }

    #[test]
    fn the_newest_unit_goes_first_and_the_lowest_comes_first() {
        let plan = plan(256 * MIB, GIB);
        let with = |units| plan.bytes_with(units);
        assert_eq!(plan.change(&[0, 2, 1], &[], with(1)), Change::Unplug(vec![1, 2]));
        assert_eq!(plan.change(&[0, 2], &[], with(4)), Change::Plug(vec![1, 3]));
        assert_eq!(plan.change(&[0, 2], &[1], with(4)), Change::Plug(vec![3, 4]));
        assert_eq!(plan.change(&[5], &[], with(1)), Change::Plug(vec![]));
    }

    proptest! {
        #[test]
        fn any_amount_in_steps_is_reached_whatever_is_present(
            boot in 1_u64..4096, max in 0_u64..80, present: u64, wanted: u32,
        ) {
            let boot_bytes = boot * 2 * MIB;
            let plan = plan(boot_bytes, boot_bytes + max * 512 * MIB);
            let present: Vec<_> =
                (0..plan.units()).filter(|unit| *unit < 64 && present >> unit & 1 == 1).collect();
            let wanted = usize::try_from(wanted % (plan.units() + 1)).unwrap();
            let after = match plan.change(&present, &[], plan.bytes_with(wanted)) {
                Change::Plug(units) => {
                    prop_assert!(units.iter().all(|unit| !present.contains(unit)));
                    present.len() + units.len()
                }
                Change::Unplug(units) => {
                    prop_assert!(units.iter().all(|unit| present.contains(unit)));
                    present.len() - units.len()
                }
            };
            prop_assert_eq!(after, wanted);
        }

        #[test]
        fn units_are_aligned_apart_and_between_boot_ram_and_the_pci_window(
            boot in 1_u64..200_000, max in 0_u64..400_000, bits in 36_u32..53,
        ) {
            let ram = Ram::of(boot * 2 * MIB);
            let Ok(plan) = Plan::new(&ram, (boot + max) * 2 * MIB, bits) else { return Ok(()) };
            prop_assert!(plan.units() <= MAX_UNITS);
            prop_assert!(plan.max_bytes() <= (boot + max) * 2 * MIB);
            for unit in 0..plan.units() {
                let range = plan.range(unit);
                prop_assert!(range.start.is_multiple_of(plan.unit_bytes()));
                prop_assert!(plan.unit_bytes().is_multiple_of(MEMORY_STEP_BYTES));
                prop_assert!(range.start >= HIGH_RAM_START.max(ram.high.end));
                prop_assert!(range.end <= pci_window_64(bits).start);
                prop_assert_eq!(range.end, plan.range(unit + 1).start);
            }
        }
    }
}
