//! The configuration space of one function (PCI Local Bus 3.0, section 6): bytes, and for each
//! byte which bits a guest may write.
//!
//! Pure: a write answers with its [`Effect`]. BAR sizing needs no code: the size bits of a BAR are
//! simply not writable.

use super::bar::{AddressRange, BAR_COUNT, BarIndex, BarSpec, BarWidth};

/// Bytes of the conventional space, and of the one that ECAM shows.
pub const CONVENTIONAL_LEN_BYTES: usize = 256;
/// Bytes of the extended space.
pub const EXTENDED_LEN_BYTES: usize = 4096;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory decoding, bus master, INTx disable: the rest has no function behind it.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CACHE_LINE_SIZE: usize = 0x0c;
const BARS: usize = 0x10;
const BAR_64_BITS: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;
const BAR_ATTRIBUTES: u64 = 0xf;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;
const MSIX_CAPABILITY: u8 = 0x11;

/// What a write changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing that anybody but the guest sees.
    None,
    /// Where or whether a BAR is decoded.
    BarMoved,
    /// The MSI-X message control register, to this value.
    MsixChanged(u16),
}

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// One function's registers.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that a guest may change; as long as `bytes`.
    writable: Vec<u8>,
    bars: [Option<BarSpec>; BAR_COUNT as usize],
    /// Where the next capability goes.
    free: usize,
    /// Where the last capability's (or the header's) pointer to the next one is.
    link: usize,
    /// Where the message control register is.
    msix_control: Option<usize>,
}

impl ConfigSpace {
    /// The type 0 header of `identity`, in a space of `len_bytes`
    /// ([`CONVENTIONAL_LEN_BYTES`] or [`EXTENDED_LEN_BYTES`]).
    #[must_use]
    pub fn new(identity: &Identity, len_bytes: usize) -> Self {
        let len_bytes = len_bytes.clamp(CONVENTIONAL_LEN_BYTES, EXTENDED_LEN_BYTES);
        let mut space = Self {
            bytes: vec![0; len_bytes],
            writable: vec![0; len_bytes],
            bars: [None; BAR_COUNT as usize],
            free: FIRST_CAPABILITY,
            link: CAPABILITY_POINTER,
            msix_control: None,
        };
        let [base, sub, interface] = identity.class;
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, interface, sub, base]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function a BAR.
    ///
    /// # Panics
    ///
    /// Panics if the register is taken, or the length is no power of two that the width can hold:
    /// functions describe themselves, a guest has no say.
    pub fn add_bar(&mut self, spec: BarSpec) {
        assert!(spec.len_bytes.is_power_of_two() && spec.len_bytes >= 16, "{spec:?}");
        let registers = if spec.width == BarWidth::Bits64 { 2 } else { 1 };
        let index = spec.index.index();
        assert!(index + registers <= usize::from(BAR_COUNT), "{spec:?} has no upper register");
        assert!(self.bar_at(index).is_none(), "{spec:?} is taken");
        assert!(registers == 2 || spec.len_bytes <= 1 << 31, "{spec:?} does not fit");
        let mut attributes = if registers == 2 { BAR_64_BITS } else { 0 };
        attributes |= if spec.prefetchable { BAR_PREFETCHABLE } else { 0 };
        self.set(BARS + 4 * index, &attributes.to_le_bytes());
        let mask = (!(spec.len_bytes - 1)).to_le_bytes();
        self.allow(BARS + 4 * index, &mask[..4 * registers]);
        self.bars[index] = Some(spec);
    }

    /// The BAR whose registers include `register`.
    fn bar_at(&self, register: usize) -> Option<BarSpec> {
        let below = register.checked_sub(1).and_then(|below| self.bars[below]);
        self.bars[register].or(below.filter(|spec| spec.width == BarWidth::Bits64))
    }

    /// Appends a capability: `body` follows the id and the pointer, `writable` are its writable
    /// bits. Returns where it starts.
    ///
    /// # Panics
    ///
    /// Panics if the conventional space is full or the two differ in length.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        assert_eq!(body.len(), writable.len(), "each byte of a capability has a mask");
        let at = self.free;
        let end = at + 2 + body.len();
        assert!(end <= CONVENTIONAL_LEN_BYTES, "capabilities do not fit");
        let pointer = u8::try_from(at).expect("at is below 256, checked above");
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.set(self.link, &[pointer]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.free = end.next_multiple_of(4);
        if id == MSIX_CAPABILITY {
            self.msix_control = Some(at + 2);
        }
        u16::from(pointer)
    }

    /// Appends the MSI-X capability (section 6.8.2): table and pending bits in `bar` at these
    /// offsets, which are multiples of eight.
    pub fn add_msix(&mut self, vectors: u16, bar: BarIndex, table: u32, pending: u32) {
        let bar = u32::from(bar.number());
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | bar).to_le_bytes());
        body[6..].copy_from_slice(&(pending | bar).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&super::msix::CONTROL_WRITABLE.to_le_bytes());
        self.add_capability(MSIX_CAPABILITY, &body, &writable);
    }

    /// All BARs of the function.
    #[must_use]
    pub fn bars(&self) -> Vec<BarSpec> {
        self.bars.iter().flatten().copied().collect()
    }

    /// Sets a BAR as firmware would.
    pub fn place_bar(&mut self, index: BarIndex, address: u64) {
        let Some(spec) = self.bars[index.index()] else { return };
        let at = BARS + 4 * index.index();
        let attributes = u64::from(self.u32_at(at)) & BAR_ATTRIBUTES;
        let value = (address & !(spec.len_bytes - 1) | attributes).to_le_bytes();
        let len = if spec.width == BarWidth::Bits64 { 8 } else { 4 };
        self.set(at, &value[..len]);
    }

    /// Clears everything that a guest can write, as a reset of the bus does.
    pub fn reset(&mut self) {
        for (byte, writable) in self.bytes.iter_mut().zip(&self.writable) {
            *byte &= !writable;
        }
    }

    /// Where the function decodes `index`, if memory decoding is on.
    #[must_use]
    pub fn decoded(&self, index: BarIndex) -> Option<AddressRange> {
        let spec = self.bars[index.index()]?;
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        if command & COMMAND_MEMORY == 0 {
            return None;
        }
        let at = BARS + 4 * index.index();
        let high = if spec.width == BarWidth::Bits64 { self.u32_at(at + 4) } else { 0 };
        let start = (u64::from(self.u32_at(at)) | u64::from(high) << 32) & !BAR_ATTRIBUTES;
        start.checked_add(spec.len_bytes)?;
        Some(AddressRange { start, len_bytes: spec.len_bytes })
    }

    /// Fills `data`; what lies beyond the space reads as zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// The guest writes; bits that are not writable keep their value.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Effect {
        let mut moved = false;
        let mut msix = false;
        let decoding = self.is_decoding();
        for (at, value) in (usize::from(offset)..).zip(data) {
            let Some(byte) = self.bytes.get_mut(at) else { break };
            let mask = self.writable[at];
            let new = *byte & !mask | value & mask;
            let changed = new != *byte;
            *byte = new;
            moved |= changed && (BARS..BARS + 4 * usize::from(BAR_COUNT)).contains(&at);
            msix |= changed && self.msix_control.is_some_and(|control| at & !1 == control);
        }
        if decoding != self.is_decoding() || moved && decoding {
            return Effect::BarMoved;
        }
        match self.msix_control {
            Some(at) if msix => {
                Effect::MsixChanged(u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]))
            }
            _ => Effect::None,
        }
    }

    fn is_decoding(&self) -> bool {
        u16::from(self.bytes[COMMAND]) & COMMAND_MEMORY != 0
    }

    fn u32_at(&self, at: usize) -> u32 {
        self.bytes[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word))
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn unheeded(_effect: Effect) {}

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: [1, 0x80, 0],
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };
    const SPEC: BarSpec = BarSpec {
        index: BarIndex::ZERO,
        len_bytes: 0x1_0000,
        width: BarWidth::Bits64,
        prefetchable: false,
    };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY, CONVENTIONAL_LEN_BYTES);
        space.add_bar(SPEC);
        space.add_msix(5, BarIndex::ZERO, 0x4000, 0x8000);
        space
    }

    fn read_u32(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones() {
        let mut space = space();
        space.place_bar(BarIndex::ZERO, 0xc000_0000);
        for (offset, old, size) in [(0x10, 0xc000_0004, 0xffff_0004), (0x14, 0, 0xffff_ffff)] {
            assert_eq!(read_u32(&space, offset), old);
            assert_eq!(space.write(offset, &[0xff; 4]), Effect::None, "decoding is off");
            assert_eq!(read_u32(&space, offset), size);
            unheeded(space.write(offset, &old.to_le_bytes()));
        }
        assert_eq!(space.write(0x18, &[0xff; 4]), Effect::None);
        assert_eq!(read_u32(&space, 0x18), 0, "there is no third BAR");
    }

    #[test]
    fn a_bar_is_decoded_when_memory_decoding_is_on_and_moves_while_it_is() {
        let mut space = space();
        space.place_bar(BarIndex::ZERO, 0xc000_0000);
        assert_eq!(space.decoded(BarIndex::ZERO), None);
        assert_eq!(space.write(4, &[2, 0]), Effect::BarMoved);
        assert_eq!(space.decoded(BarIndex::ZERO).unwrap().start, 0xc000_0000);
        assert_eq!(space.write(0x14, &[1, 0, 0, 0]), Effect::BarMoved);
        assert_eq!(space.decoded(BarIndex::ZERO).unwrap().start, 0x1_c000_0000);
        assert_eq!(space.write(0x14, &[1, 0, 0, 0]), Effect::None, "nothing changed");
        assert_eq!(space.write(4, &[0, 0]), Effect::BarMoved);
    }

    #[test]
    fn a_bar_at_the_end_of_the_address_space_is_not_decoded_beyond_it() {
        let mut space = space();
        unheeded(space.write(0x10, &[0xff; 4]));
        unheeded(space.write(0x14, &[0xff; 4]));
        assert_eq!(space.write(4, &[2, 0]), Effect::BarMoved);
        assert_eq!(space.decoded(BarIndex::ZERO), None);
    }

    #[test]
    fn capabilities_are_linked_and_only_their_writable_bits_change() {
        let mut space = space();
        let vendor = space.add_capability(9, &[7; 5], &[0xf0; 5]);
        assert_eq!(read_u32(&space, 4) >> 16 & 0x10, 0x10);
        assert_eq!(read_u32(&space, 0x34) & 0xff, 0x40);
        assert_eq!(read_u32(&space, 0x40), 0x11 | u32::from(vendor) << 8 | 4 << 16);
        assert_eq!(space.write(vendor, &[0xff; 4]), Effect::None);
        assert_eq!(read_u32(&space, vendor), 0xf7f7_0009);
    }

    #[test]
    fn the_msix_control_register_reports_its_value() {
        let mut space = space();
        assert_eq!(space.write(0x42, &[0, 0xc0]), Effect::MsixChanged(0xc004));
        assert_eq!(space.write(0x40, &[0, 0, 0, 0x80]), Effect::MsixChanged(0x8004));
        assert_eq!(space.write(0x42, &[0xff, 0x80]), Effect::None);
    }

    proptest! {
        #[test]
        fn writes_of_any_size_and_place_change_only_writable_bits(
            writes in vec((any::<u16>(), vec(any::<u8>(), 0..9)), 1..60),
        ) {
            let mut space = space();
            let (before, writable) = (space.bytes.clone(), space.writable.clone());
            for (offset, data) in writes {
                let offset = if offset & 1 == 0 { offset } else { offset % 256 };
                unheeded(space.write(offset, &data));
                if let Some(range) = space.decoded(BarIndex::ZERO) {
                    prop_assert_eq!(range.start % range.len_bytes, 0);
                }
            }
            for (at, mask) in writable.iter().enumerate() {
                prop_assert_eq!(space.bytes[at] & !mask, before[at] & !mask);
            }
        }
    }
}
