//! A device: its regions, read, written and mapped through its descriptor, and its resets.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
};

use crate::address::HostAddress;
use crate::bar::Area;
use crate::interrupt::{Interrupt, InterruptKind};
use crate::sys::{self, Mapping};

/// Regions of a PCI device that matter: six BARs, the ROM, configuration.
const REGION_COUNT: u32 = VFIO_PCI_CONFIG_REGION_INDEX + 1;

/// Why a device is of no use.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The descriptor is something else.
    #[error("the descriptor is no VFIO device")]
    NoDevice(#[source] io::Error),
    /// Not what this is for.
    #[error("the VFIO device is no PCI device")]
    NotPci,
    /// It does not tell of itself.
    #[error("the device does not describe its {what} {index}")]
    Describe {
        /// Of what.
        what: &'static str,
        /// Which.
        index: u32,
        /// Why.
        source: io::Error,
    },
    /// It can't be read.
    #[error("can't read {len_bytes} bytes at {offset:#x} of the device's region {region}")]
    Read {
        /// Which region.
        region: u32,
        /// Where.
        offset: u64,
        /// How much.
        len_bytes: usize,
        /// Why.
        source: io::Error,
    },
    /// It can't be written.
    #[error("can't write {len_bytes} bytes at {offset:#x} of the device's region {region}")]
    Write {
        /// Which region.
        region: u32,
        /// Where.
        offset: u64,
        /// How much.
        len_bytes: usize,
        /// Why.
        source: io::Error,
    },
    /// It can't be mapped.
    #[error("can't map the device's region {0}")]
    Map(u32, #[source] io::Error),
    /// It can't be reset.
    #[error("the device can't be reset")]
    Reset(#[source] io::Error),
}

/// One of a device's regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionIndex(u32);

impl RegionIndex {
    /// The configuration space.
    pub const CONFIG: Self = Self(VFIO_PCI_CONFIG_REGION_INDEX);

    /// A BAR's.
    #[must_use]
    pub fn bar(index: u8) -> Self {
        Self(u32::from(index).min(5))
    }
}

/// What VFIO says of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 if the device has none.
    pub len_bytes: u64,
    /// What of it may be mapped.
    pub mappable: Vec<Area>,
    /// Where it begins in the descriptor.
    offset: u64,
}

impl Region {
    /// From `struct vfio_region_info` and the capabilities behind it.
    fn parse(words: &[u32]) -> Option<Self> {
        let wide =
            |at: usize| Some(u64::from(*words.get(at)?) | u64::from(*words.get(at + 1)?) << 32);
        let flags = *words.get(1)?;
        let (len_bytes, offset) = (wide(4)?, wide(6)?);
        // Nothing of ours may wrap when it counts on from there.
        offset.checked_add(len_bytes)?;
        let mut mappable = Vec::new();
        if flags & VFIO_REGION_INFO_FLAG_MMAP != 0 {
            mappable = match sparse_areas(words, flags) {
                Some(areas) => areas,
                None => vec![Area { offset: 0, len_bytes }],
            };
        }
        Some(Self { len_bytes, mappable, offset })
    }
}

/// What the capability for regions that can be mapped in parts says, if it is there.
fn sparse_areas(words: &[u32], flags: u32) -> Option<Vec<Area>> {
    const MOST_CAPABILITIES: usize = 16;
    if flags & VFIO_REGION_INFO_FLAG_CAPS == 0 {
        return None;
    }
    let mut at = usize::try_from(*words.get(3)?).ok()? / 4;
    for _ in 0..MOST_CAPABILITIES {
        if at == 0 {
            break;
        }
        let header = *words.get(at)?;
        if header & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = usize::try_from(*words.get(at + 2)?).ok()?;
            let pairs = words.get(at + 4..)?.as_chunks::<4>().0.iter().take(count);
            let area = |[a, b, c, d]: &[u32; 4]| Area {
                offset: u64::from(*a) | u64::from(*b) << 32,
                len_bytes: u64::from(*c) | u64::from(*d) << 32,
            };
            return Some(pairs.map(area).collect());
        }
        at = usize::try_from(*words.get(at + 1)?).ok()? / 4;
    }
    None
}

/// A device that is ours. When its descriptor is closed everywhere, the kernel resets it.
#[derive(Debug)]
pub struct Device {
    file: File,
    can_reset: bool,
    regions: Vec<Region>,
    interrupts: Vec<Interrupt>,
}

impl Device {
    /// Asks a device what it is.
    ///
    /// # Errors
    ///
    /// Fails if the descriptor is no PCI device of VFIO's, or the device does not describe itself.
    pub fn new(fd: OwnedFd) -> Result<Self, DeviceError> {
        let file = File::from(fd);
        let info = sys::device_info(file.as_fd()).map_err(DeviceError::NoDevice)?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 || info.num_regions < REGION_COUNT {
            return Err(DeviceError::NotPci);
        }
        let mut regions = Vec::new();
        for index in 0..REGION_COUNT {
            let failed = |source| DeviceError::Describe { what: "region", index, source };
            let words = sys::region_info(file.as_fd(), index).map_err(failed)?;
            let region = Region::parse(&words);
            regions.push(region.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?);
        }
        let mut interrupts = Vec::new();
        for index in 0..info.num_irqs.min(InterruptKind::COUNT) {
            let failed = |source| DeviceError::Describe { what: "interrupt", index, source };
            let (flags, count) = match sys::irq_info(file.as_fd(), index) {
                // A device without this kind.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (0, 0),
                other => other.map_err(failed)?,
            };
            interrupts.push(Interrupt { flags, count });
        }
        let can_reset = info.flags & VFIO_DEVICE_FLAGS_RESET != 0;
        Ok(Self { file, can_reset, regions, interrupts })
    }

    /// What there is of a region; one that the device lacks is empty.
    #[must_use]
    pub fn region(&self, index: RegionIndex) -> &Region {
        const NONE: &Region = &Region { len_bytes: 0, mappable: Vec::new(), offset: 0 };
        usize::try_from(index.0).ok().and_then(|at| self.regions.get(at)).unwrap_or(NONE)
    }

    pub(crate) fn interrupt(&self, kind: InterruptKind) -> Interrupt {
        self.interrupts.get(kind.at()).copied().unwrap_or_default()
    }

    /// Where `len` bytes from `offset` of a region are in the descriptor.
    fn place(&self, index: RegionIndex, offset: u64, len: usize) -> io::Result<u64> {
        let region = self.region(index);
        match offset.checked_add(len as u64) {
            Some(end) if end <= region.len_bytes => Ok(region.offset + offset),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Reads from a region, in one access where the size is that of a register.
    ///
    /// # Errors
    ///
    /// Fails if it is not all in the region, or the device does not answer.
    pub fn read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), DeviceError> {
        let len_bytes = data.len();
        let failed = |source| DeviceError::Read { region: region.0, offset, len_bytes, source };
        let place = self.place(region, offset, len_bytes).map_err(failed)?;
        self.file.read_exact_at(data, place).map_err(failed)
    }

    /// Writes to a region.
    ///
    /// # Errors
    ///
    /// Fails if it is not all in the region, or the device does not take it.
    pub fn write(&self, region: RegionIndex, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let len_bytes = data.len();
        let failed = |source| DeviceError::Write { region: region.0, offset, len_bytes, source };
        let place = self.place(region, offset, len_bytes).map_err(failed)?;
        self.file.write_all_at(data, place).map_err(failed)
    }

    /// Maps a part of a region.
    ///
    /// # Errors
    ///
    /// Fails if it is not all in the region, or the kernel does not let it be mapped.
    pub fn map(&self, region: RegionIndex, area: Area) -> Result<Mapping, DeviceError> {
        let failed = |source| DeviceError::Map(region.0, source);
        let len = usize::try_from(area.len_bytes).map_err(io::Error::other).map_err(failed)?;
        let place = self.place(region, area.offset, len).map_err(failed)?;
        Mapping::new(&self.file, place, area.len_bytes).map_err(failed)
    }

    /// Whether it can be reset by itself.
    #[must_use]
    pub fn can_reset(&self) -> bool {
        self.can_reset
    }

    /// Resets the device by itself (a function level reset, or what it has in its place).
    ///
    /// # Errors
    ///
    /// Fails if it can't be, or does not come back.
    pub fn reset(&self) -> Result<(), DeviceError> {
        sys::reset(self.file.as_fd()).map_err(DeviceError::Reset)
    }

    /// The groups and addresses of all that a reset of the whole bus or slot reaches, this device
    /// among them.
    ///
    /// # Errors
    ///
    /// Fails if the device has no such reset.
    pub fn hot_reset_reach(&self) -> Result<Vec<(u32, HostAddress)>, DeviceError> {
        let reach = sys::hot_reset_info(self.file.as_fd()).map_err(DeviceError::Reset)?;
        Ok(reach.into_iter().map(dependent).collect())
    }

    /// Resets the device together with all that its bus or slot has, for which every group among
    /// them has to be ours.
    ///
    /// # Errors
    ///
    /// Fails if a group is missing, or the device has no such reset.
    pub fn hot_reset(&self, groups: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        sys::hot_reset(self.file.as_fd(), groups).map_err(DeviceError::Reset)
    }
}

/// `struct vfio_pci_dependent_device`: the group, then segment, bus and function.
fn dependent([group, packed]: [u32; 2]) -> (u32, HostAddress) {
    let [low, high, bus, devfn] = packed.to_ne_bytes();
    (group, HostAddress::new(u16::from_ne_bytes([low, high]), bus, devfn))
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const READ_WRITE: u32 = 3;

    #[test]
    fn a_region_is_mappable_as_a_whole_or_in_the_parts_it_names() {
        let plain = [32, READ_WRITE, 0, 0, 0x4000, 0, 0, 1];
        let region = Region::parse(&plain).unwrap();
        assert_eq!((region.len_bytes, region.offset), (0x4000, 1 << 32));
        assert!(region.mappable.is_empty());
        let whole = [32, READ_WRITE | 4, 0, 0, 0x4000, 0, 0, 1];
        let area = Area { offset: 0, len_bytes: 0x4000 };
        assert_eq!(Region::parse(&whole).unwrap().mappable, [area]);
        // First another capability, then the one with the parts.
        let mut sparse = vec![80, READ_WRITE | 4 | 8, 0, 32, 0x4000, 0, 0, 1];
        sparse.extend([3 | 1 << 16, 40, 1 | 1 << 16, 0, 1, 0, 0x1000, 0, 0x2000, 0]);
        let area = Area { offset: 0x1000, len_bytes: 0x2000 };
        assert_eq!(Region::parse(&sparse).unwrap().mappable, [area]);
    }

    #[test]
    fn a_dependent_device_is_unpacked_as_the_kernel_packs_it() {
        let packed = u32::from_ne_bytes([0, 0, 1, 0x0a]);
        assert_eq!(dependent([7, packed]).1.to_string(), "0000:01:01.2");
    }

    proptest! {
        #[test]
        fn no_description_of_a_region_does_harm(words in vec(any::<u32>(), 0..40), at in 0_u32..60) {
            let mut words = words;
            if words.len() > 3 {
                words[1] |= 12;
                words[3] = at * 4;
            }
            if let Some(region) = Region::parse(&words) {
                prop_assert!(region.offset.checked_add(region.len_bytes).is_some());
                prop_assert!(region.mappable.len() <= 10);
            }
        }
    }
}
