//! The guest's memory as a backend is told of it, and where a queue lies in it.

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::FrontendError;
use crate::virtio::pci_registers::QueueLayout;

/// Regions that every backend takes (the vhost-user specification's baseline).
pub(super) const BASELINE_REGIONS: usize = 8;

/// A queue that the driver put where no memory is, or not where it may be (virtio 1.3, section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {queue} is misaligned or not wholly in guest memory")]
pub struct QueueOutside {
    /// The queue's number.
    pub queue: usize,
}

/// The addresses of a queue in this process, which is how vhost-user names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostLayout {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// The regions of `memory`, each with the file behind it.
pub(super) fn regions(
    memory: &GuestMemoryMmap,
) -> Result<Vec<VhostUserMemoryRegionInfo>, FrontendError> {
    memory
        .iter()
        .map(|region| {
            VhostUserMemoryRegionInfo::from_guest_region(region)
                .map_err(|_error| FrontendError::Memory { reason: "a region has no file" })
        })
        .collect()
}

/// Where the queue's three parts are mapped, if each lies in one region and is aligned.
pub(super) fn host_layout(
    regions: &[VhostUserMemoryRegionInfo],
    layout: &QueueLayout,
) -> Option<HostLayout> {
    let size = u64::from(layout.size);
    // Lengths include the two event fields (virtio 1.3, section 2.7).
    Some(HostLayout {
        descriptors: host_address(regions, layout.descriptors, 16 * size, 16)?,
        available: host_address(regions, layout.available, 6 + 2 * size, 2)?,
        used: host_address(regions, layout.used, 6 + 8 * size, 4)?,
    })
}

fn host_address(
    regions: &[VhostUserMemoryRegionInfo],
    address: u64,
    len_bytes: u64,
    alignment: u64,
) -> Option<u64> {
    let end = address.checked_add(len_bytes)?;
    let region = regions.iter().find(|region| {
        address >= region.guest_phys_addr && end - region.guest_phys_addr <= region.memory_size
    })?;
    let offset = address - region.guest_phys_addr;
    address.is_multiple_of(alignment).then_some(region.userspace_addr + offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<VhostUserMemoryRegionInfo> {
        let region = |guest_phys_addr, memory_size, userspace_addr| VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size,
            userspace_addr,
            mmap_offset: 0,
            mmap_handle: 0,
        };
        vec![region(0, 0x10000, 0x7000_0000), region(0x1_0000_0000, 0x10000, 0x8000_0000)]
    }

    #[test]
    fn a_queue_is_found_in_the_region_that_holds_it() {
        let layout = QueueLayout {
            size: 16,
            descriptors: 0x1000,
            available: 0x1_0000_0002,
            used: 0x1_0000_ff00,
        };
        let host = host_layout(&table(), &layout).unwrap();
        let expected =
            HostLayout { descriptors: 0x7000_1000, available: 0x8000_0002, used: 0x8000_ff00 };
        assert_eq!(host, expected);
    }

    #[test]
    fn parts_outside_across_or_misaligned_are_refused() {
        let good = QueueLayout { size: 256, descriptors: 0, available: 0x2000, used: 0x3000 };
        assert!(host_layout(&table(), &good).is_some());
        for bad in [
            QueueLayout { descriptors: 0xf010, ..good },
            QueueLayout { descriptors: 8, ..good },
            QueueLayout { available: 0x2001, ..good },
            QueueLayout { available: 0x10000, ..good },
            QueueLayout { used: 0x3002, ..good },
            QueueLayout { used: u64::MAX - 3, ..good },
            QueueLayout { used: 0xfffc, ..good },
        ] {
            assert_eq!(host_layout(&table(), &bad), None, "{bad:?}");
        }
    }
}
