//! Which guest memory a device may reach: a ledger of ranges, and the container that holds them.
//!
//! The ledger is pure. [`DmaMap`] changes the IOMMU first and the ledger when that has succeeded,
//! so that the two agree; what is in it is unmapped in reverse when it is dropped. Guest addresses
//! are the device's addresses, one to one. Only the guest's RAM is ever put in: no device's
//! registers are (so no device can write to another one), and nothing of the VMM's.

use std::io;

use vm_memory::VolatileSlice;

use crate::bar::PAGE_BYTES;
use crate::container::Container;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len_bytes: u64,
}

impl DmaRange {
    fn end(self) -> u64 {
        self.start + self.len_bytes
    }

    fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Why a range does not go into the ledger, or not out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// Empty, not in whole pages, or beyond the address space.
    #[error("{len_bytes:#x} bytes at {start:#x} are no range of pages")]
    Malformed {
        /// First address.
        start: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Some of it is there already.
    #[error("{len_bytes:#x} bytes at {start:#x} are mapped in part already")]
    Overlap {
        /// First address.
        start: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// It is not there as it stands.
    #[error("{len_bytes:#x} bytes at {start:#x} were not mapped as one range")]
    Absent {
        /// First address.
        start: u64,
        /// Bytes.
        len_bytes: u64,
    },
}

/// The ranges that are mapped, in the order in which they were.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Disjoint.
    ranges: Vec<DmaRange>,
}

impl Ledger {
    /// Whether `range` could be added.
    ///
    /// # Errors
    ///
    /// Fails if it is malformed or overlaps one that is there.
    pub fn check(&self, range: DmaRange) -> Result<(), LedgerError> {
        let DmaRange { start, len_bytes } = range;
        let in_pages = start.is_multiple_of(PAGE_BYTES) && len_bytes.is_multiple_of(PAGE_BYTES);
        if len_bytes == 0 || !in_pages || start.checked_add(len_bytes).is_none() {
            return Err(LedgerError::Malformed { start, len_bytes });
        }
        if self.ranges.iter().any(|other| other.overlaps(range)) {
            return Err(LedgerError::Overlap { start, len_bytes });
        }
        Ok(())
    }

    /// Adds a range.
    ///
    /// # Errors
    ///
    /// As [`Ledger::check`].
    pub fn add(&mut self, range: DmaRange) -> Result<(), LedgerError> {
        self.check(range)?;
        self.ranges.push(range);
        Ok(())
    }

    /// Removes a range that was added as it stands.
    ///
    /// # Errors
    ///
    /// Fails if it was not.
    pub fn remove(&mut self, range: DmaRange) -> Result<(), LedgerError> {
        let at = self.find(range)?;
        self.ranges.remove(at);
        Ok(())
    }

    fn find(&self, range: DmaRange) -> Result<usize, LedgerError> {
        let DmaRange { start, len_bytes } = range;
        let at = self.ranges.iter().position(|other| *other == range);
        at.ok_or(LedgerError::Absent { start, len_bytes })
    }

    /// The range that was added last.
    #[must_use]
    pub fn last(&self) -> Option<DmaRange> {
        self.ranges.last().copied()
    }

    /// Whether `address` is in it.
    #[must_use]
    pub fn holds(&self, address: u64) -> bool {
        self.ranges.iter().any(|range| (range.start..range.end()).contains(&address))
    }

    /// How much is mapped.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len_bytes).sum()
    }
}

/// Why memory is not mapped for a device, or still is.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// It makes no sense.
    #[error("a device's memory")]
    Ledger(#[from] LedgerError),
    /// The process may not pin so much.
    #[error(
        "can't pin {len_bytes:#x} bytes of guest memory for a device beside the {pinned_bytes:#x} \
         that are pinned for it: RLIMIT_MEMLOCK is {limit_bytes:#x} bytes; raise it (each device \
         pins all guest memory, and the limit counts it once for each device)"
    )]
    Limit {
        /// How much was to be pinned.
        len_bytes: u64,
        /// How much is for this device.
        pinned_bytes: u64,
        /// How much all may be together.
        limit_bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The IOMMU or the host's memory does not do it.
    #[error("the IOMMU can't map {len_bytes:#x} bytes at {start:#x}")]
    Map {
        /// First address.
        start: u64,
        /// Bytes.
        len_bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// It stays mapped.
    #[error("the IOMMU can't unmap {len_bytes:#x} bytes at {start:#x}")]
    Unmap {
        /// First address.
        start: u64,
        /// Bytes.
        len_bytes: u64,
        /// Why.
        source: io::Error,
    },
}

/// A container's mappings.
#[derive(Debug)]
pub struct DmaMap {
    container: Container,
    ledger: Ledger,
}

impl DmaMap {
    /// Nothing mapped yet.
    #[must_use]
    pub fn new(container: Container) -> Self {
        Self { container, ledger: Ledger::default() }
    }

    /// Lets the container's devices reach `memory` at the guest address `start`. Pins all of it.
    ///
    /// # Errors
    ///
    /// Fails if the range is malformed or known, or the host does not allow it.
    pub fn add(&mut self, start: u64, memory: &VolatileSlice<'_>) -> Result<(), DmaError> {
        let range = DmaRange { start, len_bytes: memory.len() as u64 };
        self.ledger.check(range)?;
        self.container.map(start, memory).map_err(|source| self.cannot_map(range, source))?;
        Ok(self.ledger.add(range)?)
    }

    fn cannot_map(&self, range: DmaRange, source: io::Error) -> DmaError {
        let DmaRange { start, len_bytes } = range;
        match (source.raw_os_error(), memory_lock_limit()) {
            (Some(libc::ENOMEM | libc::EPERM), Some(limit_bytes)) => {
                let pinned_bytes = self.ledger.len_bytes();
                DmaError::Limit { len_bytes, pinned_bytes, limit_bytes, source }
            }
            _ => DmaError::Map { start, len_bytes, source },
        }
    }

    /// Takes back what [`DmaMap::add`] gave, as one range.
    ///
    /// # Errors
    ///
    /// Fails if it was not given, or the IOMMU refuses.
    pub fn remove(&mut self, range: DmaRange) -> Result<(), DmaError> {
        self.ledger.find(range)?;
        let DmaRange { start, len_bytes } = range;
        let failed = |source| DmaError::Unmap { start, len_bytes, source };
        self.container.unmap(start, len_bytes).map_err(failed)?;
        Ok(self.ledger.remove(range)?)
    }

    /// Whether the container's devices reach the guest address `address`.
    #[must_use]
    pub fn reaches(&self, address: u64) -> bool {
        self.ledger.holds(address)
    }

    /// Takes everything back, the last range first.
    ///
    /// # Errors
    ///
    /// Fails at the first range that the IOMMU refuses.
    pub fn clear(&mut self) -> Result<(), DmaError> {
        while let Some(range) = self.ledger.last() {
            self.remove(range)?;
        }
        Ok(())
    }

    /// How much is pinned.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.ledger.len_bytes()
    }
}

impl Drop for DmaMap {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            // It goes with the container.
            log::warn!("{error}");
        }
    }
}

/// How much this process may lock, if that is limited.
fn memory_lock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn range(start: u64, len_bytes: u64) -> DmaRange {
        DmaRange { start, len_bytes }
    }

    #[test]
    fn what_is_no_range_of_pages_is_refused() {
        let ledger = Ledger::default();
        for (start, len_bytes) in
            [(0, 0), (1, 4096), (0, 4095), (u64::MAX - 4095, 4096), (4096, u64::MAX - 4095)]
        {
            let refused = Err(LedgerError::Malformed { start, len_bytes });
            assert_eq!(ledger.check(range(start, len_bytes)), refused);
        }
    }

    #[test]
    fn a_range_goes_in_once_and_out_as_it_went_in() {
        let mut ledger = Ledger::default();
        ledger.add(range(0, 0x4000)).unwrap();
        ledger.add(range(0x1_0000, 0x1000)).unwrap();
        let overlap = Err(LedgerError::Overlap { start: 0x3000, len_bytes: 0x2000 });
        assert_eq!(ledger.add(range(0x3000, 0x2000)), overlap);
        ledger.add(range(0x4000, 0x1000)).unwrap();
        let absent = Err(LedgerError::Absent { start: 0, len_bytes: 0x1000 });
        assert_eq!(ledger.remove(range(0, 0x1000)), absent, "a part of one");
        assert_eq!(ledger.last(), Some(range(0x4000, 0x1000)));
        ledger.remove(range(0, 0x4000)).unwrap();
        assert_eq!(ledger.len_bytes(), 0x2000);
    }

    proptest! {
        #[test]
        fn the_ledger_agrees_with_a_set_of_pages(
            steps in vec((any::<bool>(), 0_u64..40, 0_u64..8), 1..120),
        ) {
            let mut ledger = Ledger::default();
            let mut pages = [false; 48];
            let mut held: Vec<DmaRange> = Vec::new();
            for (adds, first, count) in steps {
                let wanted = range(first * PAGE_BYTES, count * PAGE_BYTES);
                let part = usize::try_from(first).unwrap()..usize::try_from(first + count).unwrap();
                if adds {
                    let free = !pages[part.clone()].iter().any(|taken| *taken) && count > 0;
                    prop_assert_eq!(ledger.add(wanted).is_ok(), free);
                    if free {
                        pages[part].fill(true);
                        held.push(wanted);
                    }
                } else {
                    let there = held.iter().position(|other| *other == wanted);
                    prop_assert_eq!(ledger.remove(wanted).is_ok(), there.is_some());
                    if let Some(at) = there {
                        held.remove(at);
                        pages[part].fill(false);
                    }
                }
                let taken = pages.iter().filter(|taken| **taken).count() as u64;
                prop_assert_eq!(ledger.len_bytes(), taken * PAGE_BYTES);
                prop_assert_eq!(ledger.last(), held.last().copied());
            }
        }
    }
}
