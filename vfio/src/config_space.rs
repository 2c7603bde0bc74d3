//! A device's configuration space as its guest sees it: our bytes, and the device's own bits where
//! they are passed through.
//!
//! Pure: a read asks for the device's bytes only where it needs them, a write says what goes to the
//! device and what it meant to us. Which bits are whose is decided once, from what the device said
//! when it was taken over; it can't change its mind later.

use crate::bar::{BAR_COUNT, Bar};
use crate::capability::{long, word};
use crate::msix::MsixLayout;
use crate::policy::{self, BARS, COMMAND, COMMAND_MEMORY};

/// What a write changed for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// Where or whether a BAR is decoded.
    BarsMoved,
    /// The MSI-X control register, to this value.
    MsixChanged(u16),
    /// The MSI capability.
    MsiChanged(MsiState),
}

/// What a guest made of the MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiState {
    /// How many vectors it enabled; 0 for none.
    pub vectors: u16,
    /// Where the messages go.
    pub address: u64,
    /// The first vector's message; the others' follow.
    pub data: u32,
}

/// What goes to the device: so many bytes, from the place of the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToDevice {
    bytes: [u8; 4],
    len: usize,
}

impl ToDevice {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Where the MSI capability is and what it can.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Msi {
    pub(crate) at: usize,
    pub(crate) is_64_bits: bool,
    pub(crate) vectors: u16,
}

/// The space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    /// What is ours; zero in the bits that are the device's.
    pub(crate) bytes: Vec<u8>,
    /// The bits of ours that a guest changes.
    pub(crate) writable: Vec<u8>,
    /// The bits that are the device's, which a guest reads and writes.
    pub(crate) device: Vec<u8>,
    pub(crate) bars: Vec<Bar>,
    pub(crate) msi: Option<Msi>,
    /// Where the control register is, and what the capability says.
    pub(crate) msix: Option<(usize, MsixLayout)>,
    /// `bytes` as they were at first.
    at_reset: Vec<u8>,
}

impl ConfigSpace {
    /// What a guest sees of a device whose configuration reads as `said`, and whose BARs have
    /// these `sizes`. With `has_line` it may see the legacy interrupt.
    #[must_use]
    pub fn new(said: &[u8], sizes: [u64; BAR_COUNT], has_line: bool) -> Self {
        policy::apply(said, sizes, has_line)
    }

    pub(crate) fn blank(len: usize) -> Self {
        Self {
            bytes: vec![0; len],
            writable: vec![0; len],
            device: vec![0; len],
            bars: Vec::new(),
            msi: None,
            msix: None,
            at_reset: Vec::new(),
        }
    }

    /// The policy is applied.
    pub(crate) fn settle(&mut self) {
        self.at_reset.clone_from(&self.bytes);
    }

    /// The memory BARs.
    #[must_use]
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// The MSI-X capability, if the device has one.
    #[must_use]
    pub fn msix(&self) -> Option<MsixLayout> {
        self.msix.map(|(_control, layout)| layout)
    }

    /// How many vectors MSI has; 0 without.
    #[must_use]
    pub fn msi_vectors(&self) -> u16 {
        self.msi.map_or(0, |msi| msi.vectors)
    }

    /// Back to what it was at first. The device's own bits are reset with the device.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.at_reset);
    }

    /// Sets a BAR as firmware would.
    pub fn place_bar(&mut self, index: u8, address: u64) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == index) else { return };
        let at = BARS + 4 * usize::from(index);
        let attributes = u64::from(self.bytes[at] & 0xf);
        let value = (address & !(bar.len_bytes - 1) | attributes).to_le_bytes();
        let len = if bar.is_64_bits { 8 } else { 4 };
        self.bytes[at..at + len].copy_from_slice(&value[..len]);
    }

    /// The first address of a BAR, if it is decoded.
    #[must_use]
    pub fn decoded(&self, index: u8) -> Option<u64> {
        let bar = self.bars.iter().find(|bar| bar.index == index)?;
        if !self.is_decoding() {
            return None;
        }
        let at = BARS + 4 * usize::from(index);
        let high = if bar.is_64_bits { long(&self.bytes, at + 4) } else { 0 };
        let start = (u64::from(long(&self.bytes, at)) | u64::from(high) << 32) & !0xf;
        start.checked_add(bar.len_bytes)?;
        Some(start)
    }

    fn is_decoding(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY != 0
    }

    /// Fills `data` for a guest's read; `ask` fills it with what the device has there, and is
    /// called only if some of it is wanted. What lies beyond the space reads as zero.
    pub fn read(&self, offset: u16, data: &mut [u8], ask: impl FnOnce(&mut [u8])) {
        let start = usize::from(offset);
        data.fill(0);
        let wanted = self.device.iter().skip(start).take(data.len()).any(|bits| *bits != 0);
        if wanted {
            ask(data);
        }
        for (at, byte) in (start..).zip(data) {
            let (own, device) = (self.bytes.get(at), self.device.get(at));
            *byte = *byte & device.unwrap_or(&0) | own.unwrap_or(&0);
        }
    }

    /// A guest writes a piece of at most four bytes: what goes to the device, and what it meant.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> (Option<ToDevice>, Effect) {
        let start = usize::from(offset);
        let decoded_before = self.is_decoding();
        let mut to_device = ToDevice { bytes: [0; 4], len: 0 };
        let (mut is_for_device, mut changed) = (false, false);
        for (at, value) in (start..).zip(data.iter().take(4)) {
            let Some(byte) = self.bytes.get_mut(at) else { break };
            let new = *byte & !self.writable[at] | value & self.writable[at];
            changed |= new != *byte;
            *byte = new;
            is_for_device |= self.device[at] != 0;
            // The device itself decodes its memory all the time.
            let fixed = if at == COMMAND { COMMAND_MEMORY } else { 0 };
            to_device.bytes[to_device.len] = value & self.device[at] | fixed;
            to_device.len += 1;
        }
        let touched = start..start + to_device.len;
        let effect = if changed { self.effect(touched, decoded_before) } else { Effect::None };
        (is_for_device.then_some(to_device), effect)
    }

    fn effect(&self, touched: std::ops::Range<usize>, decoded_before: bool) -> Effect {
        let touches = |at: usize, len: usize| touched.start < at + len && at < touched.end;
        let bars_moved = decoded_before && touches(BARS, 4 * BAR_COUNT);
        if decoded_before != self.is_decoding() || bars_moved {
            return Effect::BarsMoved;
        }
        match (self.msix, self.msi) {
            (Some((control, _layout)), _) if touches(control, 2) => {
                Effect::MsixChanged(word(&self.bytes, control))
            }
            (_, Some(msi)) if touches(msi.at + 2, 14) => Effect::MsiChanged(self.msi_state(msi)),
            _ => Effect::None,
        }
    }

    fn msi_state(&self, msi: Msi) -> MsiState {
        const ENABLE: u16 = 1;
        let control = word(&self.bytes, msi.at + 2);
        let (high, data) = if msi.is_64_bits {
            (long(&self.bytes, msi.at + 8), word(&self.bytes, msi.at + 12))
        } else {
            (0, word(&self.bytes, msi.at + 8))
        };
        let vectors = (1_u16 << (control >> 4 & 7)).min(msi.vectors);
        MsiState {
            vectors: if control & ENABLE == 0 { 0 } else { vectors },
            address: u64::from(long(&self.bytes, msi.at + 4)) | u64::from(high) << 32,
            data: data.into(),
        }
    }
}

#[cfg(test)]
mod tests;
