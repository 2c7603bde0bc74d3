//! What a guest gets to see of a device's configuration, and what of it is the device's own.
//!
//! What is not named here is not there for the guest: it reads as zero and no write reaches the
//! device. Above all: BARs and interrupts are emulated; the ROM, I/O space, SR-IOV, ATS, PRI,
//! PASID and resizable BARs are hidden; a function stands alone; power management is only played,
//! as a device that sleeps would answer a guest's access to a mapped BAR with a fault.

use crate::bar::{self, BAR_COUNT, Bar};
use crate::capability::{
    CONVENTIONAL_BYTES, Capability, EXTENDED_BYTES, MSI_64_BITS, MSI_MASKS, POINTER, STATUS,
    STATUS_CAPABILITIES, conventional, extended, extended_id, id, long, word,
};
use crate::config_space::{ConfigSpace, Msi};
use crate::msix::MsixLayout;

pub(crate) const COMMAND: usize = 0x04;
/// Memory decoding: emulated. The device's own stays on for as long as we have it.
pub(crate) const COMMAND_MEMORY: u8 = 1 << 1;
const CACHE_LINE: usize = 0x0c;
const HEADER_TYPE: usize = 0x0e;
pub(crate) const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

/// Of the two interrupt kinds that are messages: the writable bits of the control register.
const MSI_CONTROL: [u8; 2] = [0x71, 0];
const MSIX_CONTROL: [u8; 2] = [0, 0xc0];

/// Device and port types of a PCI Express capability (PCI Express 6.0, section 7.5.3.2).
const EXPRESS_TYPE: u8 = 0xf0;
const ROOT_COMPLEX_ENDPOINT: u8 = 9 << 4;

/// A space that is being made.
pub(crate) struct Draft<'a> {
    /// What the device says.
    said: &'a [u8],
    space: ConfigSpace,
}

/// What a guest sees of a device that says `said` and has BARs of these `sizes`; with `has_line`,
/// it has a legacy interrupt that can be sent to a guest.
pub(crate) fn apply(said: &[u8], sizes: [u64; BAR_COUNT], has_line: bool) -> ConfigSpace {
    let len = if said.len() >= EXTENDED_BYTES { EXTENDED_BYTES } else { CONVENTIONAL_BYTES };
    let mut said = said.to_vec();
    said.resize(len, 0);
    let mut draft = Draft { said: &said, space: ConfigSpace::blank(len) };
    draft.header(sizes, has_line);
    draft.conventional_list();
    draft.extended_list();
    draft.space.settle();
    draft.space
}

impl Draft<'_> {
    /// The guest reads what the device said, and can't change it.
    fn copy(&mut self, at: usize, len: usize) {
        self.space.bytes[at..at + len].copy_from_slice(&self.said[at..at + len]);
    }

    fn set(&mut self, at: usize, value: u8) {
        self.space.bytes[at] = value;
    }

    /// The guest changes these bits, and nobody else sees them.
    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.space.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// The guest reads and writes the device's own bits. The kernel has a say in it too.
    fn pass(&mut self, at: usize, bits: &[u8]) {
        self.space.device[at..at + bits.len()].copy_from_slice(bits);
        for (byte, bits) in self.space.bytes[at..].iter_mut().zip(bits) {
            *byte &= !bits;
        }
    }

    fn header(&mut self, sizes: [u64; BAR_COUNT], has_line: bool) {
        // Vendor and device; revision and class.
        self.copy(0x00, 4);
        self.copy(0x08, 4);
        // Bus master, parity and system errors, the legacy interrupt's switch.
        self.pass(COMMAND, &[0x44, 0x05]);
        self.allow(COMMAND, &[COMMAND_MEMORY, 0]);
        self.pass(STATUS, &[!STATUS_CAPABILITIES, 0xff]);
        self.allow(CACHE_LINE, &[0xff]);
        self.copy(HEADER_TYPE, 1);
        self.space.bytes[HEADER_TYPE] &= 0x7f;
        self.copy(SUBSYSTEM, 4);
        self.allow(INTERRUPT_LINE, &[0xff]);
        if has_line && self.said[INTERRUPT_PIN] != 0 {
            // Alone in its slot, a function has the first pin.
            self.set(INTERRUPT_PIN, 1);
        }
        let registers = std::array::from_fn(|index| long(self.said, BARS + 4 * index));
        for bar in bar::bars(registers, sizes) {
            self.add_bar(bar);
        }
    }

    fn add_bar(&mut self, bar: Bar) {
        let at = BARS + 4 * usize::from(bar.index);
        let kind = if bar.is_64_bits { 0b100 } else { 0 };
        self.set(at, kind | if bar.is_prefetchable { 0b1000 } else { 0 });
        let mask = (!(bar.len_bytes - 1)).to_le_bytes();
        self.allow(at, &mask[..if bar.is_64_bits { 8 } else { 4 }]);
        self.space.bars.push(bar);
    }

    fn conventional_list(&mut self) {
        let mut link = POINTER;
        for capability in conventional(self.said) {
            if !self.conventional(capability) {
                continue;
            }
            let offset = u8::try_from(capability.offset).unwrap_or(0);
            self.set(capability.offset, self.said[capability.offset]);
            self.set(link, offset);
            self.set(STATUS, STATUS_CAPABILITIES);
            link = capability.offset + 1;
        }
    }

    /// Puts a capability's content in, or says that the guest is not to see it.
    fn conventional(&mut self, capability: Capability) -> bool {
        let Capability { id, offset: at, len_bytes } = capability;
        match id {
            id::POWER if len_bytes >= 8 => {
                self.copy(at + 2, 2);
                // No power management events.
                self.space.bytes[at + 3] &= 0x07;
                self.allow(at + 4, &[0x03, 0]);
                self.set(at + 4, self.said[at + 4] & 0x08);
            }
            id::MSI if len_bytes >= 10 => self.msi(at, len_bytes),
            id::MSIX if len_bytes >= 12 => return self.msix(at),
            id::VENDOR if len_bytes >= 3 => {
                self.pass(at + 2, &vec![0xff; len_bytes - 2]);
            }
            id::SUBSYSTEM if len_bytes >= 8 => self.copy(at + 2, 6),
            id::EXPRESS if len_bytes >= 0x14 => self.express(at, len_bytes),
            id::ADVANCED if len_bytes >= 6 => {
                self.copy(at + 2, 2);
                self.pass(at + 4, &[0xff, 0xff]);
            }
            _ => return false,
        }
        true
    }

    fn msi(&mut self, at: usize, len_bytes: usize) {
        let control = word(self.said, at + 2);
        let is_64_bits = control & MSI_64_BITS != 0 && len_bytes >= 14;
        // Nothing enabled yet, and no masks.
        let told = control & !MSI_MASKS & 0x0e | if is_64_bits { MSI_64_BITS } else { 0 };
        let [low, high] = told.to_le_bytes();
        self.set(at + 2, low);
        self.set(at + 3, high);
        self.allow(at + 2, &MSI_CONTROL);
        self.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff]);
        if is_64_bits {
            self.allow(at + 8, &[0xff; 6]);
        } else {
            self.allow(at + 8, &[0xff; 2]);
        }
        // Five is the most that there can be (2^5 vectors).
        let vectors = 1 << (control >> 1 & 7).min(5);
        self.space.msi = Some(Msi { at, is_64_bits, vectors });
    }

    fn msix(&mut self, at: usize) -> bool {
        let capability = self.said[at..].first_chunk();
        let Some(layout) = capability.and_then(MsixLayout::parse) else { return false };
        self.copy(at + 2, 10);
        self.space.bytes[at + 3] &= 0x07;
        self.allow(at + 2, &MSIX_CONTROL);
        self.space.msix = Some((at + 2, layout));
        true
    }

    /// It stands on the root bus, so it is an endpoint of the root complex, which has no link.
    fn express(&mut self, at: usize, len_bytes: usize) {
        const LINK: std::ops::Range<usize> = 0x0c..0x24;
        const SECOND_LINK: usize = 0x2c;
        self.copy(at + 2, len_bytes - 2);
        self.space.bytes[at + 2] = self.said[at + 2] & !EXPRESS_TYPE | ROOT_COMPLEX_ENDPOINT;
        self.space.bytes[at + 3] &= 0x3e;
        // Device control and status: payload sizes, and the function level reset.
        self.pass(at + 8, &[0xff; 4]);
        let end = len_bytes.min(LINK.end);
        self.space.bytes[at + LINK.start..at + end].fill(0);
        if len_bytes > SECOND_LINK {
            self.space.bytes[at + SECOND_LINK..at + len_bytes].fill(0);
        }
        if len_bytes > 0x28 {
            // Time-outs and the like are the host's.
            self.space.bytes[at + 0x28..at + 0x2c].fill(0);
        }
    }

    /// Only what tells of the device: its serial number, and what its vendor says.
    fn extended_list(&mut self) {
        let mut link: Option<usize> = None;
        for Capability { id, offset: at, len_bytes } in extended(self.said) {
            if !matches!(id, extended_id::SERIAL_NUMBER | extended_id::VENDOR) {
                continue;
            }
            self.copy(at, len_bytes);
            // The upper 12 bits of the header lead on; the lower four of those 16 are a version.
            self.space.bytes[at + 2] &= 0x0f;
            self.space.bytes[at + 3] = 0;
            // The list begins at a fixed place: an empty capability leads on from there.
            let from = link.unwrap_or(CONVENTIONAL_BYTES);
            if from != at {
                let next = u16::try_from(at).unwrap_or(0) << 4;
                let [low, high] = next.to_le_bytes();
                self.space.bytes[from + 2] |= low;
                self.space.bytes[from + 3] = high;
            }
            link = Some(at);
        }
    }
}
