//! The MSI-X table and pending bits of one function (PCI Local Bus 3.0, section 6.8.2).
//!
//! Pure: it knows which vector may fire with which message, and says when that changes. Who sends
//! the message, and what is pending, is known elsewhere.

/// Most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry.
pub const ENTRY_LEN_BYTES: u64 = 16;

const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// The writable bits of the message control register.
pub const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;
const ENTRY_MASKED: u32 = 1;

/// A message-signalled interrupt: a write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Where the message is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// What an access changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum MsixEffect {
    /// Nothing that anybody sees.
    None,
    /// A vector's deliverability or message changed: ask [`Msix::message`] again.
    Changed,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
}

/// The state after a reset.
const RESET_ENTRY: Entry = Entry { address: 0, data: 0, masked: true };

/// A function's vectors.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
}

impl Msix {
    /// `vectors` vectors, all masked, MSI-X disabled.
    ///
    /// # Panics
    ///
    /// Panics if `vectors` is 0 or above [`MAX_VECTORS`]: the caller counts them.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        assert!((1..=MAX_VECTORS).contains(&vectors), "a function has 1 to 2048 vectors");
        Self {
            entries: vec![RESET_ENTRY; usize::from(vectors)],
            enabled: false,
            function_masked: false,
        }
    }

    /// How many vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) -> MsixEffect {
        self.entries.fill(RESET_ENTRY);
        self.enabled = false;
        self.function_masked = false;
        MsixEffect::Changed
    }

    /// The guest wrote the message control register.
    pub fn set_control(&mut self, control: u16) -> MsixEffect {
        let (enabled, masked) = (control & ENABLE != 0, control & FUNCTION_MASK != 0);
        let changed = (enabled, masked) != (self.enabled, self.function_masked);
        (self.enabled, self.function_masked) = (enabled, masked);
        if changed { MsixEffect::Changed } else { MsixEffect::None }
    }

    /// Whether the guest uses MSI-X at all.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The message of `vector`, if it may be sent now.
    #[must_use]
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.entries.get(usize::from(vector))?;
        (self.enabled && !self.function_masked && !entry.masked)
            .then_some(MsiMessage { address: entry.address, data: entry.data })
    }

    /// Fills `data` from the table; what lies beyond it reads as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in (0..).zip(data) {
            let at = offset.saturating_add(index);
            let entry = usize::try_from(at / ENTRY_LEN_BYTES)
                .ok()
                .and_then(|index| self.entries.get(index));
            let within = usize::try_from(at % ENTRY_LEN_BYTES).unwrap_or(0);
            *byte = entry.map_or(0, |entry| entry.bytes()[within]);
        }
    }

    /// The guest writes to the table: aligned accesses of four or eight bytes, all else is ignored
    /// (PCI Local Bus 3.0, section 6.8.2 allows no other).
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> MsixEffect {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return MsixEffect::None;
        }
        let index = usize::try_from(offset / ENTRY_LEN_BYTES).unwrap_or(usize::MAX);
        let Some(entry) = self.entries.get_mut(index) else { return MsixEffect::None };
        let before = entry.bytes();
        for (at, word) in (offset % ENTRY_LEN_BYTES..).step_by(4).zip(data.as_chunks().0) {
            entry.write(at, u32::from_le_bytes(*word));
        }
        if entry.bytes() == before { MsixEffect::None } else { MsixEffect::Changed }
    }

    /// Fills `data` from the pending bits; `is_pending` is asked for masked vectors only.
    pub fn read_pending(&self, offset: u64, data: &mut [u8], is_pending: impl Fn(u16) -> bool) {
        for (index, byte) in (0..).zip(data) {
            let at = offset.saturating_add(index);
            let vectors = (0..8_u64).map(|bit| (bit, at.saturating_mul(8).saturating_add(bit)));
            *byte = vectors
                .filter_map(|(bit, vector)| Some((bit, u16::try_from(vector).ok()?)))
                .filter(|(_bit, vector)| *vector < self.vectors())
                .filter(|(_bit, vector)| self.message(*vector).is_none() && is_pending(*vector))
                .fold(0, |byte, (bit, _vector)| byte | 1 << bit);
        }
    }
}

impl Entry {
    fn bytes(&self) -> [u8; 16] {
        let control = if self.masked { ENTRY_MASKED } else { 0 };
        let high = u64::from(self.data) | u64::from(control) << 32;
        (u128::from(self.address) | u128::from(high) << 64).to_le_bytes()
    }

    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            // The two lowest address bits are reserved (section 6.8.2.4).
            0 => self.address = self.address & !0xffff_ffff | u64::from(value & !3),
            4 => self.address = self.address & 0xffff_ffff | u64::from(value) << 32,
            8 => self.data = value,
            _ => self.masked = value & ENTRY_MASKED != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn unheeded(_effect: MsixEffect) {}

    fn table_u32(msix: &Msix, offset: u64) -> u32 {
        let mut data = [0; 4];
        msix.read_table(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn after_reset_every_vector_is_masked_and_msix_disabled() {
        let mut msix = Msix::new(3);
        for entry in 0..3_u64 {
            assert_eq!(table_u32(&msix, entry * 16 + 12), 1);
        }
        assert_eq!(msix.set_control(ENABLE), MsixEffect::Changed);
        assert!((0..3).all(|vector| msix.message(vector).is_none()));
        assert_eq!(msix.write_table(12, &[0; 4]), MsixEffect::Changed);
        assert!(msix.message(0).is_some());
        assert_eq!(msix.reset(), MsixEffect::Changed);
        assert!(!msix.is_enabled());
        assert_eq!(table_u32(&msix, 12), 1);
    }

    #[test]
    fn a_vector_fires_only_if_enabled_and_unmasked_twice() {
        let mut msix = Msix::new(1);
        unheeded(msix.write_table(0, &0x1234_fee0_1003_u64.to_le_bytes()));
        unheeded(msix.write_table(8, &0x41_u64.to_le_bytes()));
        assert_eq!(msix.message(0), None);
        unheeded(msix.set_control(ENABLE | FUNCTION_MASK));
        assert_eq!(msix.message(0), None);
        unheeded(msix.set_control(ENABLE));
        assert_eq!(msix.message(0), Some(MsiMessage { address: 0x1234_fee0_1000, data: 0x41 }));
        unheeded(msix.write_table(12, &1_u32.to_le_bytes()));
        assert_eq!(msix.message(0), None);
    }

    #[test]
    fn a_write_that_changes_nothing_has_no_effect() {
        let mut msix = Msix::new(1);
        assert_eq!(msix.write_table(12, &1_u32.to_le_bytes()), MsixEffect::None);
        assert_eq!(msix.write_table(8, &5_u32.to_le_bytes()), MsixEffect::Changed);
        assert_eq!(msix.write_table(8, &5_u32.to_le_bytes()), MsixEffect::None);
        assert_eq!(msix.set_control(0), MsixEffect::None);
    }

    #[test]
    fn pending_bits_are_those_of_vectors_that_may_not_fire() {
        let mut msix = Msix::new(10);
        unheeded(msix.set_control(ENABLE));
        unheeded(msix.write_table(3 * 16 + 12, &[0; 4]));
        let mut pending = [0xff; 8];
        msix.read_pending(0, &mut pending, |vector| matches!(vector, 1 | 3 | 9));
        assert_eq!(pending, [2, 2, 0, 0, 0, 0, 0, 0]);
        msix.read_pending(u64::MAX, &mut pending[..1], |_vector| true);
        assert_eq!(pending[0], 0);
    }

    proptest! {
        #[test]
        fn no_access_of_any_size_or_place_breaks_the_table(
            accesses in vec((any::<u64>(), vec(any::<u8>(), 0..9), any::<u16>()), 1..100),
        ) {
            let mut msix = Msix::new(5);
            for (offset, bytes, control) in accesses {
                let offset = if control & 1 == 0 { offset % 128 } else { offset };
                unheeded(msix.write_table(offset, &bytes));
                unheeded(msix.set_control(control));
                let mut data = bytes.clone();
                msix.read_table(offset, &mut data);
                msix.read_pending(offset, &mut data, |_vector| true);
                prop_assert!((5..64).all(|vector| msix.message(vector).is_none()));
            }
        }
    }
}
