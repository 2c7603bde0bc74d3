//! The two address spaces a vCPU exits to, port I/O and MMIO, as immutable sorted tables.
//!
//! A table is built once, before the first vCPU runs, and never changes: a vCPU looks an address
//! up without a lock or a reference count. What moves at run time (PCI BARs) moves inside one
//! device that owns its whole window. A device is called from any vCPU thread, several at once, so
//! it keeps its own lock and holds it for register work only; it never talks to another process.

use std::{fmt, ops::RangeInclusive, sync::Arc};

/// The first port of the legacy PCI configuration mechanism: address at 0xcf8, data at 0xcfc.
pub const PCI_CONFIG_PORT: u64 = 0xcf8;
const PCI_CONFIG_PORTS: RangeInclusive<u64> = PCI_CONFIG_PORT..=0xcff;

/// Registers that a vCPU reaches by port I/O or MMIO.
///
/// `offset` counts from the start of the device's range. An access never crosses the range's end:
/// the bus cuts it. `data` is 1 to 8 bytes, little-endian, and of any length in between; a device
/// answers odd lengths too, as the guest chooses them. A read starts with `data` all ones, so a
/// device that does not know a register may leave it as it is.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes the `data` that the guest writes at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device can't have a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or leaves the address space.
    #[error("the range of {len:#x} bytes at {base:#x} is empty or leaves the address space")]
    Range {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device has part of it.
    #[error("the range at {base:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address of the new range.
        base: u64,
        /// First address of the range that is there.
        other: u64,
    },
}

/// A bus under construction.
#[derive(Default)]
pub struct BusBuilder {
    entries: Vec<Entry>,
}

struct Entry {
    base: u64,
    /// Inclusive, so that a range may end at the last address.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space: sorted, disjoint ranges and their devices.
///
/// Cloning shares the table.
#[derive(Clone)]
pub struct Bus {
    entries: Arc<[Entry]>,
    /// The device behind the PCI configuration ports, found without a search: they take nearly all
    /// port exits of a boot.
    pci_config: Option<Arc<dyn BusDevice>>,
}

impl BusBuilder {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `len` bytes at `base` to `device`.
    ///
    /// # Errors
    ///
    /// Fails if the range is empty, wraps, or overlaps another.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|rest| base.checked_add(rest))
            .ok_or(BusError::Range { base, len })?;
        let index = self.entries.partition_point(|entry| entry.last < base);
        if let Some(next) = self.entries.get(index)
            && next.base <= last
        {
            return Err(BusError::Overlap { base, other: next.base });
        }
        self.entries.insert(index, Entry { base, last, device });
        Ok(())
    }

    /// The finished bus; `fast_pci_ports` is for the port bus.
    fn finish(self, fast_pci_ports: bool) -> Bus {
        let pci_config = self
            .entries
            .iter()
            .find(|entry| entry.base == PCI_CONFIG_PORT && entry.last == *PCI_CONFIG_PORTS.end())
            .filter(|_entry| fast_pci_ports)
            .map(|entry| Arc::clone(&entry.device));
        Bus { entries: self.entries.into(), pci_config }
    }

    /// The finished port bus.
    #[must_use]
    pub fn into_pio(self) -> Bus {
        self.finish(true)
    }

    /// The finished MMIO bus.
    #[must_use]
    pub fn into_mmio(self) -> Bus {
        self.finish(false)
    }
}

impl Bus {
    /// Answers a vCPU's read at `address`; what no device answers reads as all ones.
    ///
    /// All ones is what an empty bus gives, and it ends the probes that poll: an absent i8042 has
    /// status 0xff, an absent UART 0xff in its line status.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset, len)) = self.find(address, data.len()) {
            device.read(offset, &mut data[..len]);
        }
    }

    /// Hands a vCPU's write at `address` to its device; nobody misses a write to nothing.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset, len)) = self.find(address, data.len()) {
            device.write(offset, &data[..len]);
        }
    }

    /// The device at `address`, the offset in its range, and how much of `len` is in the range.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64, usize)> {
        if PCI_CONFIG_PORTS.contains(&address)
            && let Some(device) = &self.pci_config
        {
            return Some((
                &**device,
                address - PCI_CONFIG_PORT,
                fitting(address, *PCI_CONFIG_PORTS.end(), len),
            ));
        }
        let index = self.entries.partition_point(|entry| entry.last < address);
        let entry = self.entries.get(index).filter(|entry| entry.base <= address)?;
        Some((&*entry.device, address - entry.base, fitting(address, entry.last, len)))
    }
}

/// How many of `len` bytes at `address` are not after `last`, which is not before `address`.
fn fitting(address: u64, last: u64, len: usize) -> usize {
    let beyond_first = usize::try_from(last - address).unwrap_or(usize::MAX);
    len.min(beyond_first.saturating_add(1))
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|entry| entry.base..=entry.last)).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::{collection::vec, prelude::proptest};

    use super::*;

    /// Reads as its number, remembers what was written.
    struct Probe {
        number: u8,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl Probe {
        fn new(number: u8) -> Arc<Self> {
            Arc::new(Self { number, written: Mutex::default() })
        }
    }

    impl BusDevice for Probe {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(self.number);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn read_u32(bus: &Bus, address: u64) -> u32 {
        let mut data = [0; 4];
        bus.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_access_reaches_the_device_whose_range_holds_it() {
        let (low, high) = (Probe::new(1), Probe::new(2));
        let mut builder = BusBuilder::new();
        builder.insert(0x2000, 0x1000, high.clone()).unwrap();
        builder.insert(0x1000, 0x1000, low.clone()).unwrap();
        let bus = builder.into_mmio();
        assert_eq!(read_u32(&bus, 0x1000), 0x0101_0101);
        assert_eq!(read_u32(&bus, 0x2ffc), 0x0202_0202);
        bus.write(0x2010, &[7, 8]);
        assert_eq!(*high.written.lock().unwrap(), [(0x10, vec![7, 8])]);
        assert!(low.written.lock().unwrap().is_empty());
    }

    #[test]
    fn what_no_device_answers_reads_as_ones() {
        let mut builder = BusBuilder::new();
        builder.insert(0x1000, 4, Probe::new(1)).unwrap();
        let bus = builder.into_pio();
        assert_eq!(read_u32(&bus, 0xffc), u32::MAX);
        assert_eq!(read_u32(&bus, 0x1004), u32::MAX);
        assert_eq!(read_u32(&bus, 0x1002), 0xffff_0101);
    }

    #[test]
    fn the_pci_ports_are_one_device_with_offsets_from_0xcf8() {
        let pci = Probe::new(3);
        let mut builder = BusBuilder::new();
        builder.insert(PCI_CONFIG_PORT, 8, pci.clone()).unwrap();
        let bus = builder.into_pio();
        bus.write(0xcfe, &[1, 2, 3, 4]);
        assert_eq!(*pci.written.lock().unwrap(), [(6, vec![1, 2])]);
        assert_eq!(read_u32(&bus, 0xcf7), u32::MAX);
        assert_eq!(read_u32(&bus, 0xd00), u32::MAX);
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let mut builder = BusBuilder::new();
        builder.insert(0x1000, 0x1000, Probe::new(1)).unwrap();
        for base in [0x0801, 0x1000, 0x1fff] {
            assert_eq!(
                builder.insert(base, 0x800, Probe::new(2)),
                Err(BusError::Overlap { base, other: 0x1000 })
            );
        }
        let device = Probe::new(2);
        assert_eq!(builder.insert(0, 0, device.clone()), Err(BusError::Range { base: 0, len: 0 }));
        let base = u64::MAX;
        assert_eq!(builder.insert(base, 2, device.clone()), Err(BusError::Range { base, len: 2 }));
        assert_eq!(builder.insert(base, 1, device), Ok(()));
    }

    proptest! {
        #[test]
        fn a_lookup_finds_what_a_linear_search_finds(
            ranges in vec((0_u64..256, 1_u64..16), 0..24),
            address in 0_u64..300,
        ) {
            let mut builder = BusBuilder::new();
            let mut model: Vec<(u64, u64, u8)> = Vec::new();
            for (number, (base, len)) in (0..).zip(ranges) {
                if builder.insert(base, len, Probe::new(number)).is_ok() {
                    model.push((base, base + len, number));
                }
            }
            let bus = builder.into_mmio();
            let expected = model
                .iter()
                .find(|(base, end, _number)| (*base..*end).contains(&address))
                .map_or(0xff, |(_base, _end, number)| *number);
            let mut data = [0];
            bus.read(address, &mut data);
            assert_eq!(data[0], expected);
        }
    }
}
