//! How a vCPU reaches the bus: the memory-mapped configuration space, the two legacy ports, and
//! the two windows.
//!
//! Guests choose sizes and alignments freely, so every access is cut into aligned pieces that lie
//! within one function and one register.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::bar::AddressRange;
use super::bus::PciBus;
use super::slot::Slot;
use crate::bus::BusDevice;

/// Bytes of the memory-mapped configuration space of one bus (PCI Express 6.0, section 7.2.2).
pub const ECAM_LEN_BYTES: u64 = 1 << 20;

/// Bytes of one function's configuration space.
const FUNCTION_LEN_BYTES: u64 = 1 << 12;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// The memory-mapped configuration space of one segment's bus.
#[derive(Debug)]
pub struct Ecam {
    bus: Arc<PciBus>,
}

impl Ecam {
    /// For `bus`; takes [`ECAM_LEN_BYTES`] of address space.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }

    /// The slot and register at `offset`, if that is function 0 of a slot: no device here has a
    /// second function.
    fn target(offset: u64) -> Option<(Slot, u16)> {
        let function = (offset / FUNCTION_LEN_BYTES) % 8;
        let slot = u8::try_from(offset / FUNCTION_LEN_BYTES / 8).ok().and_then(Slot::new)?;
        let register = u16::try_from(offset % FUNCTION_LEN_BYTES).ok()?;
        (function == 0).then_some((slot, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, len) in pieces(offset, data.len()) {
            let start = usize::try_from(at - offset).unwrap_or(usize::MAX);
            let piece = &mut data[start..start + len];
            match Self::target(at) {
                Some((slot, register)) => self.bus.read_config(slot, register, piece),
                None => piece.fill(0xff),
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, len) in pieces(offset, data.len()) {
            let start = usize::try_from(at - offset).unwrap_or(usize::MAX);
            if let Some((slot, register)) = Self::target(at) {
                self.bus.write_config(slot, register, &data[start..start + len]);
            }
        }
    }
}

/// Ports 0xcf8 to 0xcff (PCI Local Bus 3.0, section 3.2.2.3.2): an address, and a window of four
/// bytes on what it names. They reach the first segment only.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    /// What was last written to the address port. A guest serialises its accesses by itself.
    address: AtomicU32,
}

impl ConfigPorts {
    /// For `bus`.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: AtomicU32::new(0) }
    }

    /// The slot and register that the address and `offset` in the data window name.
    fn target(&self, offset: u64) -> Option<(Slot, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let [register, slot_and_function, bus, _reserved] = address.to_le_bytes();
        let named = address & ADDRESS_ENABLE != 0 && bus == 0 && slot_and_function % 8 == 0;
        let slot = Slot::new(slot_and_function / 8).filter(|_slot| named)?;
        let byte = u16::try_from(offset % 4).ok()?;
        Some((slot, u16::from(register & !3) + byte))
    }
}

const DATA: u64 = 4;

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let len = data.len();
        if offset == 0 && len == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            return;
        }
        for (at, len) in pieces(offset, len).filter(|(at, _len)| *at >= DATA) {
            let start = usize::try_from(at - offset).unwrap_or(usize::MAX);
            if let Some((slot, register)) = self.target(at) {
                self.bus.read_config(slot, register, &mut data[start..start + len]);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset < DATA {
            // Shorter writes to the address port are not for it (0xcf9 is a reset register
            // elsewhere).
            if let (0, Ok(address)) = (offset, data.try_into()) {
                self.address.store(u32::from_le_bytes(address), Ordering::Relaxed);
            }
            return;
        }
        for (at, len) in pieces(offset, data.len()) {
            let start = usize::try_from(at - offset).unwrap_or(usize::MAX);
            if let Some((slot, register)) = self.target(at) {
                self.bus.write_config(slot, register, &data[start..start + len]);
            }
        }
    }
}

/// One of the two windows that BARs lie in.
#[derive(Debug)]
pub struct MmioWindow {
    bus: Arc<PciBus>,
    window: AddressRange,
}

impl MmioWindow {
    /// The window below 4 GiB.
    #[must_use]
    pub fn low(bus: Arc<PciBus>) -> Self {
        let window = bus.windows().low;
        Self { bus, window }
    }

    /// The window above all memory.
    #[must_use]
    pub fn high(bus: Arc<PciBus>) -> Self {
        let window = bus.windows().high;
        Self { bus, window }
    }

    /// Where to put it on the MMIO bus.
    #[must_use]
    pub fn range(&self) -> AddressRange {
        self.window
    }
}

impl BusDevice for MmioWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.bus.read_memory(self.window.start.saturating_add(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.bus.write_memory(self.window.start.saturating_add(offset), data);
    }
}

/// Cuts an access into naturally aligned pieces of 1, 2 or 4 bytes: (offset, length).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let end = offset.saturating_add(len as u64);
    let mut at = offset;
    std::iter::from_fn(move || {
        let piece = [4, 2, 1].into_iter().find(|len| at.is_multiple_of(*len) && at + len <= end)?;
        let start = at;
        at += piece;
        Some((start, usize::try_from(piece).unwrap_or(1)))
    })
}
