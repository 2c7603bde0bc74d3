//! The bus: which function sits in which slot, and which addresses its BARs decode.
//!
//! A vCPU's access takes a read lock for the length of a look-up and calls the function without
//! it. The map of decoded BARs changes only when a guest moves a BAR, which no driver does at run
//! time. A BAR counts as mapped only where it lies wholly inside a window: a guest that puts one
//! over its memory, the interrupt controllers or the ECAM finds nothing there.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::bar::{AddressRange, BarIndex, BarSpec, BarWidth, WindowAllocator};
use super::host_bridge::HostBridge;
use super::slot::{SLOT_COUNT, Slot, SlotAllocator};
use super::{ConfigEffect, PciFunction};
use crate::locked;

/// A BAR of at most this length is placed below 4 GiB, where any guest reaches it; longer ones go
/// to the high window if they have 64 bits.
const LOW_BAR_LEN_BYTES: u64 = 1 << 20;

/// Where BARs may lie; both are announced in ACPI.
#[derive(Clone, Copy, Debug)]
pub struct PciWindows {
    /// Below 4 GiB.
    pub low: AddressRange,
    /// Above all memory.
    pub high: AddressRange,
}

/// Why a function can't be attached or detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// All slots are taken.
    #[error("no PCI slot is free")]
    NoSlot,
    /// Another function sits there.
    #[error("PCI slot {0} is taken")]
    SlotTaken(u8),
    /// Nothing sits there.
    #[error("PCI slot {0} is empty")]
    SlotEmpty(u8),
    /// The windows are full.
    #[error("no window has room for a BAR of {len_bytes:#x} bytes")]
    NoRoom {
        /// The BAR's length.
        len_bytes: u64,
    },
}

/// Bus 0 of one segment.
pub struct PciBus {
    windows: PciWindows,
    /// Read by every configuration access, written by attach and detach.
    functions: RwLock<[Option<Arc<dyn PciFunction>>; SLOT_COUNT as usize]>,
    /// Read by every MMIO access, written when a BAR moves.
    map: RwLock<Vec<Mapped>>,
    /// Touched by attach and detach only, which may come from two threads.
    placement: Mutex<Placement>,
}

struct Placement {
    slots: SlotAllocator,
    low: WindowAllocator,
    high: WindowAllocator,
    /// What each attached function was given.
    given: Vec<Given>,
}

struct Given {
    slot: Slot,
    bar: BarIndex,
    range: AddressRange,
}

#[derive(Clone)]
struct Mapped {
    range: AddressRange,
    slot: Slot,
    bar: BarIndex,
    function: Arc<dyn PciFunction>,
}

impl PciBus {
    /// A bus with a host bridge in slot 0.
    #[must_use]
    pub fn new(windows: PciWindows) -> Self {
        let mut functions = [const { None }; SLOT_COUNT as usize];
        let host_bridge: Arc<dyn PciFunction> = Arc::new(HostBridge::new());
        functions[Slot::HOST_BRIDGE.index()] = Some(host_bridge);
        let mut slots = SlotAllocator::default();
        slots.reserve(Slot::HOST_BRIDGE);
        let placement = Placement {
            slots,
            low: WindowAllocator::new(windows.low),
            high: WindowAllocator::new(windows.high),
            given: Vec::new(),
        };
        Self {
            windows,
            functions: RwLock::new(functions),
            map: RwLock::default(),
            placement: Mutex::new(placement),
        }
    }

    /// The windows.
    #[must_use]
    pub fn windows(&self) -> PciWindows {
        self.windows
    }

    /// Puts `function` into the lowest free slot and places its BARs.
    ///
    /// # Errors
    ///
    /// Fails if no slot is free or the windows are full; nothing is changed then.
    pub fn attach(&self, function: Arc<dyn PciFunction>) -> Result<Slot, PciError> {
        let mut placement = locked(&self.placement);
        let slot = placement.slots.allocate().ok_or(PciError::NoSlot)?;
        self.settle(&mut placement, slot, function)
    }

    /// Puts `function` into `slot` and places its BARs.
    ///
    /// # Errors
    ///
    /// Fails if the slot is taken or the windows are full; nothing is changed then.
    pub fn attach_at(&self, slot: Slot, function: Arc<dyn PciFunction>) -> Result<Slot, PciError> {
        let mut placement = locked(&self.placement);
        if !placement.slots.reserve(slot) {
            return Err(PciError::SlotTaken(slot.number()));
        }
        self.settle(&mut placement, slot, function)
    }

    fn settle(
        &self,
        placement: &mut Placement,
        slot: Slot,
        function: Arc<dyn PciFunction>,
    ) -> Result<Slot, PciError> {
        for spec in function.bars() {
            match placement.place(spec) {
                Some(range) => {
                    placement.given.push(Given { slot, bar: spec.index, range });
                    function.place_bar(spec.index, range.start);
                }
                None => {
                    placement.clear(slot);
                    return Err(PciError::NoRoom { len_bytes: spec.len_bytes });
                }
            }
        }
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions[slot.index()] = Some(function);
        Ok(slot)
    }

    /// Takes the function out of `slot`; its BARs are no longer mapped.
    ///
    /// # Errors
    ///
    /// Fails if the slot is empty, or holds the host bridge.
    pub fn detach(&self, slot: Slot) -> Result<Arc<dyn PciFunction>, PciError> {
        let function = self.withdraw(slot).ok_or(PciError::SlotEmpty(slot.number()))?;
        self.release(slot);
        Ok(function)
    }

    /// Makes the function in `slot` disappear from the guest: nothing answers there, its BARs are
    /// no longer mapped. The slot and the BARs' places stay taken until [`PciBus::release`].
    pub fn withdraw(&self, slot: Slot) -> Option<Arc<dyn PciFunction>> {
        if slot == Slot::HOST_BRIDGE {
            return None;
        }
        let function = {
            let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
            functions[slot.index()].take()?
        };
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        for mapped in map.extract_if(.., |mapped| mapped.slot == slot) {
            mapped.function.bar_mapped(mapped.bar, None);
        }
        Some(function)
    }

    /// Gives back `slot`, whose function was withdrawn, and the places of its BARs.
    pub fn release(&self, slot: Slot) {
        debug_assert!(self.function(slot).is_none(), "the function is withdrawn first");
        locked(&self.placement).clear(slot);
    }

    /// Resets the configuration of all functions, with every vCPU stopped: nothing is decoded, and
    /// BARs are where they were at the start.
    pub fn reset(&self) {
        let placement = locked(&self.placement);
        for slot in (0..SLOT_COUNT).filter_map(Slot::new) {
            let Some(function) = self.function(slot) else { continue };
            function.reset_config();
            for given in placement.given.iter().filter(|given| given.slot == slot) {
                function.place_bar(given.bar, given.range.start);
            }
            self.remap(slot);
        }
    }

    /// The function in `slot`.
    #[must_use]
    pub fn function(&self, slot: Slot) -> Option<Arc<dyn PciFunction>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions[slot.index()].clone()
    }

    /// A guest reads the configuration of `slot`; an empty slot reads as all ones.
    pub(super) fn read_config(&self, slot: Slot, offset: u16, data: &mut [u8]) {
        match self.function(slot) {
            Some(function) => function.read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A guest writes the configuration of `slot`, one aligned piece of at most four bytes.
    pub(super) fn write_config(&self, slot: Slot, offset: u16, data: &[u8]) {
        let Some(function) = self.function(slot) else { return };
        match function.write_config(offset, data) {
            ConfigEffect::None => {}
            ConfigEffect::BarsMoved => self.remap(slot),
        }
    }

    /// Brings the map into line with what the function in `slot` decodes. The function is asked
    /// under the map's lock: of two vCPUs that move a BAR at once, the last one here sees the final
    /// state.
    fn remap(&self, slot: Slot) {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        // Asked again: the function may have been detached in between.
        let Some(function) = self.function(slot) else { return };
        for spec in function.bars() {
            let old = map.iter().position(|mapped| mapped.slot == slot && mapped.bar == spec.index);
            let new = function.decoded(spec.index).filter(|range| self.is_in_window(*range));
            if old.map(|at| map[at].range) == new {
                continue;
            }
            if let Some(at) = old {
                map.swap_remove(at);
            }
            function.bar_mapped(spec.index, new);
            if let Some(range) = new {
                let function = Arc::clone(&function);
                map.push(Mapped { range, slot, bar: spec.index, function });
            }
        }
        map.sort_by_key(|mapped| (mapped.range.start, mapped.slot));
    }

    fn is_in_window(&self, range: AddressRange) -> bool {
        self.windows.low.contains(range) || self.windows.high.contains(range)
    }

    /// The BAR at `address`, the offset in it, and how much of `len` lies in it.
    fn find(&self, address: u64, len: usize) -> Option<(Mapped, u64, usize)> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        // A guest may have put one BAR over another, so the search is linear; the map is short.
        let one = AddressRange { start: address, len_bytes: 1 };
        let mapped = map.iter().find(|mapped| mapped.range.contains(one))?.clone();
        let rest = usize::try_from(mapped.range.end() - address).unwrap_or(usize::MAX);
        let offset = address - mapped.range.start;
        Some((mapped, offset, len.min(rest)))
    }

    /// A guest reads at `address` in a window; where no BAR is, `data` keeps what it holds.
    pub(super) fn read_memory(&self, address: u64, data: &mut [u8]) {
        if let Some((mapped, offset, len)) = self.find(address, data.len()) {
            mapped.function.read_bar(mapped.bar, offset, &mut data[..len]);
        }
    }

    /// A guest writes at `address` in a window.
    pub(super) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((mapped, offset, len)) = self.find(address, data.len()) {
            mapped.function.write_bar(mapped.bar, offset, &data[..len]);
        }
    }
}

impl Placement {
    fn place(&mut self, spec: BarSpec) -> Option<AddressRange> {
        match spec.width {
            BarWidth::Bits32 => self.low.allocate(spec.len_bytes),
            BarWidth::Bits64 if spec.len_bytes > LOW_BAR_LEN_BYTES => {
                self.high.allocate(spec.len_bytes).or_else(|| self.low.allocate(spec.len_bytes))
            }
            BarWidth::Bits64 => {
                self.low.allocate(spec.len_bytes).or_else(|| self.high.allocate(spec.len_bytes))
            }
        }
    }

    /// Takes everything back that `slot` was given, and the slot.
    fn clear(&mut self, slot: Slot) {
        for given in self.given.extract_if(.., |given| given.slot == slot) {
            let released = self.low.release(given.range) || self.high.release(given.range);
            debug_assert!(released, "a range that was given comes from a window");
        }
        self.slots.release(slot);
    }
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciBus").field("windows", &self.windows).finish_non_exhaustive()
    }
}
