//! How devices follow RAM that comes and goes.

use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::{Device, Devices, DevicesError, Entry, device::failed};
use crate::{error_chain, passthrough::Assigned, virtio::VirtioDevice};

impl Device {
    /// Whether its backend takes as many regions as `memory` has.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn takes(&self, memory: &GuestMemoryMmap) -> Result<(), DevicesError> {
        let wanted = memory.num_regions();
        match self {
            Self::Virtio(device) if device.max_regions() < wanted => {
                let (id, most) = (device.name().to_owned(), device.max_regions());
                Err(DevicesError::Regions { id, most, wanted })
            }
            Self::Virtio(_) | Self::Assigned(_) => Ok(()),
        }
    }
}

impl Entry {
    fn virtio(&self) -> Option<&VirtioDevice> {
        match &self.device {
            Device::Virtio(device) => Some(device),
            Device::Assigned(_) => None,
        }
    }

    fn assigned(&mut self) -> Option<&mut Assigned> {
        match &mut self.device {
            Device::Virtio(_) => None,
            Device::Assigned(device) => Some(device),
        }
    }
}

impl Devices {
    /// Has every backend's memory be `memory`. One that can't is lost.
    pub fn follow_memory(&mut self, memory: &GuestMemoryMmap) {
        for entry in &mut self.all {
            if let Device::Virtio(device) = &mut entry.device {
                device.follow_memory(memory);
            }
        }
    }

    /// The device whose backend takes the fewest regions of memory, and how many.
    #[must_use]
    pub fn fewest_regions(&self) -> Option<(String, usize)> {
        let devices = self.all.iter().filter_map(Entry::virtio);
        let fewest = devices.min_by_key(|device| device.max_regions())?;
        Some((fewest.name().to_owned(), fewest.max_regions()))
    }

    /// Lets the host's devices reach RAM that was added.
    ///
    /// # Errors
    ///
    /// Fails if one of them can't; none of them can then.
    pub fn map_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), DevicesError> {
        let mut assigned = self.all.iter_mut().filter_map(Entry::assigned);
        let mapped =
            assigned.try_for_each(|device| device.add_memory(region).map_err(failed(device)));
        if mapped.is_err()
            && let Err(error) = self.unmap_for_dma(region)
        {
            log::error!("{}", error_chain(&error));
        }
        mapped
    }

    /// Keeps the host's devices from RAM that is to go.
    ///
    /// # Errors
    ///
    /// Fails if one of them may still reach it.
    pub fn unmap_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), DevicesError> {
        let (start, len_bytes) = (region.start_addr(), region.len());
        let assigned = self.all.iter_mut().filter_map(Entry::assigned);
        let reach = assigned.filter(|device| device.reaches(start));
        let unmapped =
            reach.map(|device| device.remove_memory(start, len_bytes).map_err(failed(device)));
        // All of them, whatever becomes of one.
        unmapped.fold(Ok(()), Result::and)
    }
}
