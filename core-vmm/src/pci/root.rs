//! All buses of the VM: one a segment, each with its own configuration space and windows.
//!
//! A bus has 32 slots, so that a guest with more devices needs more segments. They are all there
//! from the start, as ACPI tells of them before the guest runs; the functions come and go.

use std::fmt;
use std::sync::Arc;

use super::PciFunction;
use super::bus::{PciBus, PciError, PciWindows};
use super::slot::Slot;

/// Where the guest finds a function: always bus 0 and function 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Which segment.
    pub segment: u16,
    /// Which slot on its bus.
    pub slot: Slot,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:00:{:02x}.0", self.segment, self.slot.number())
    }
}

/// The buses, by segment.
#[derive(Debug)]
pub struct PciRoot {
    segments: Vec<Arc<PciBus>>,
}

impl PciRoot {
    /// One bus for each of `windows`.
    #[must_use]
    pub fn new(windows: impl IntoIterator<Item = PciWindows>) -> Self {
        Self { segments: windows.into_iter().map(|windows| PciBus::new(windows).into()).collect() }
    }

    /// The buses, by segment.
    #[must_use]
    pub fn segments(&self) -> &[Arc<PciBus>] {
        &self.segments
    }

    /// Puts `function` into the first free slot of the first segment that has room for its BARs.
    ///
    /// # Errors
    ///
    /// Fails if there is no such segment; nothing is changed then.
    pub fn attach(&self, function: &Arc<dyn PciFunction>) -> Result<PciAddress, PciError> {
        let mut refusal = PciError::NoSlot;
        for (segment, bus) in (0..).zip(&self.segments) {
            match bus.attach(Arc::clone(function)) {
                Ok(slot) => return Ok(PciAddress { segment, slot }),
                Err(PciError::NoSlot) => {}
                // The reason that a free slot is of no use says more than that others are taken.
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    /// As [`PciBus::withdraw`].
    pub fn withdraw(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        self.bus(address)?.withdraw(address.slot)
    }

    /// As [`PciBus::release`].
    pub fn release(&self, address: PciAddress) {
        if let Some(bus) = self.bus(address) {
            bus.release(address.slot);
        }
    }

    /// As [`PciBus::reset`], for all.
    pub fn reset(&self) {
        for bus in &self.segments {
            bus.reset();
        }
    }

    fn bus(&self, address: PciAddress) -> Option<&PciBus> {
        self.segments.get(usize::from(address.segment)).map(|bus| &**bus)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::pci::tests::Probe;
    use crate::pci::{AddressRange, BarIndex, BarWidth};

    const LOW: AddressRange = AddressRange { start: 0xc000_0000, len_bytes: 0x10_0000 };
    const NONE: AddressRange = AddressRange { start: 0xc000_0000, len_bytes: 0 };

    fn high(segment: u64) -> AddressRange {
        AddressRange { start: 0x80_0000_0000 + segment * 0x1000_0000, len_bytes: 0x1000_0000 }
    }

    /// The first segment alone has a window below 4 GiB.
    fn root(segments: u64) -> PciRoot {
        PciRoot::new((0..segments).map(|segment| PciWindows {
            low: if segment == 0 { LOW } else { NONE },
            high: high(segment),
        }))
    }

    fn function(probe: Arc<Probe>) -> Arc<dyn PciFunction> {
        probe
    }

    #[test]
    fn the_first_free_slot_of_all_segments_is_taken_and_an_address_names_both() {
        let root = root(2);
        let attach = || root.attach(&function(Probe::small()));
        let all: Vec<_> = (0..62).map(|_| attach().unwrap().to_string()).collect();
        assert_eq!(all[0], "0000:00:01.0");
        assert_eq!(all[30], "0000:00:1f.0");
        assert_eq!(all[31], "0001:00:01.0");
        assert_eq!(attach(), Err(PciError::NoSlot));
        let address = PciAddress { segment: 0, slot: Slot::new(7).unwrap() };
        assert!(root.withdraw(address).is_some());
        assert_eq!(attach(), Err(PciError::NoSlot), "it is not released");
        assert!(root.withdraw(address).is_none());
        root.release(address);
        assert_eq!(attach(), Ok(address));
    }

    #[test]
    fn a_function_that_only_the_first_segment_has_room_for_goes_there_or_nowhere() {
        let root = root(2);
        let wide = || root.attach(&function(Probe::new(0x8_0000, BarWidth::Bits32)));
        assert_eq!(wide().unwrap().segment, 0);
        assert_eq!(wide().unwrap().segment, 0);
        assert_eq!(wide(), Err(PciError::NoRoom { len_bytes: 0x8_0000 }));
        let small = root.attach(&function(Probe::small())).unwrap();
        assert_eq!((small.segment, small.slot.number()), (0, 3), "it has 64 bits");
    }

    proptest! {
        #[test]
        fn functions_that_come_and_go_never_share_a_slot_or_an_address(
            steps in vec((any::<bool>(), 12_u32..22, any::<prop::sample::Index>()), 1..200),
        ) {
            let root = root(2);
            let mut held: Vec<(PciAddress, Arc<dyn PciFunction>)> = Vec::new();
            for (remove, log2, which) in steps {
                if remove && !held.is_empty() {
                    let (address, _function) = held.swap_remove(which.index(held.len()));
                    prop_assert!(root.withdraw(address).is_some());
                    root.release(address);
                    continue;
                }
                let new = function(Probe::new(1 << log2, BarWidth::Bits64));
                let Ok(address) = root.attach(&new) else { continue };
                let ranges = |function: &Arc<dyn PciFunction>| {
                    let _switched_on = function.write_config(4, &[2, 0]);
                    function.decoded(BarIndex::ZERO).unwrap()
                };
                let range = ranges(&new);
                let segment = u64::from(address.segment);
                prop_assert!(high(segment).contains(range) || segment == 0 && LOW.contains(range));
                for (other, function) in &held {
                    prop_assert!(*other != address);
                    prop_assert!(!ranges(function).overlaps(range));
                }
                held.push((address, new));
            }
            for (address, _function) in held {
                root.withdraw(address);
                root.release(address);
            }
            prop_assert_eq!(root.attach(&function(Probe::small())).unwrap().slot.number(), 1);
        }
    }
}
