#![expect(unsafe_code, reason = "VFIO is ioctls and mappings of a device's registers")]
//! VFIO's system calls, one a function. Owned, safe types come out.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE, vfio_device_info,
    vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_irq_info,
};
use vm_memory::VolatileSlice;

/// `_IO(';', VFIO_BASE + number)`: VFIO's numbers carry neither direction nor size.
const fn request(number: u32) -> libc::Ioctl {
    // Both widen; `From` is not const.
    let kind = VFIO_TYPE as libc::Ioctl;
    kind << 8 | (VFIO_BASE + number) as libc::Ioctl
}

const GET_API_VERSION: libc::Ioctl = request(0);
const CHECK_EXTENSION: libc::Ioctl = request(1);
const SET_IOMMU: libc::Ioctl = request(2);
const GROUP_GET_STATUS: libc::Ioctl = request(3);
const GROUP_SET_CONTAINER: libc::Ioctl = request(4);
const GROUP_GET_DEVICE_FD: libc::Ioctl = request(6);
const DEVICE_GET_INFO: libc::Ioctl = request(7);
const DEVICE_GET_REGION_INFO: libc::Ioctl = request(8);
const DEVICE_GET_IRQ_INFO: libc::Ioctl = request(9);
const DEVICE_SET_IRQS: libc::Ioctl = request(10);
const DEVICE_RESET: libc::Ioctl = request(11);
const DEVICE_GET_HOT_RESET_INFO: libc::Ioctl = request(12);
const DEVICE_HOT_RESET: libc::Ioctl = request(13);
const IOMMU_MAP_DMA: libc::Ioctl = request(13);
const IOMMU_UNMAP_DMA: libc::Ioctl = request(14);

/// What a thread that does these calls has to be allowed by a filter of system calls: setting
/// interrupts, both resets, and DMA mappings, which share a number with a hot reset.
pub const IOCTLS_AT_RUN_TIME: [u64; 9] = [
    GET_API_VERSION,
    CHECK_EXTENSION,
    DEVICE_GET_INFO,
    DEVICE_GET_REGION_INFO,
    DEVICE_GET_IRQ_INFO,
    DEVICE_SET_IRQS,
    DEVICE_RESET,
    IOMMU_MAP_DMA,
    IOMMU_UNMAP_DMA,
];

/// What a driver's writes to a device's registers can bring about.
pub const IOCTLS_OF_DRIVERS: [u64; 1] = [DEVICE_SET_IRQS];

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Bytes of a structure, as its `argsz` says it.
fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// The version of the API that a container speaks.
pub(crate) fn api_version(container: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(container.as_raw_fd(), GET_API_VERSION) })
}

/// Whether a container supports an IOMMU type.
pub(crate) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    let extension = libc::c_ulong::from(extension);
    // SAFETY: the argument is a plain number.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), CHECK_EXTENSION, extension) };
    Ok(check(result)? > 0)
}

/// Chooses a container's IOMMU type, once its first group is in it.
pub(crate) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    let kind = libc::c_ulong::from(kind);
    // SAFETY: the argument is a plain number.
    check(unsafe { libc::ioctl(container.as_raw_fd(), SET_IOMMU, kind) })?;
    Ok(())
}

/// A group's flags.
pub(crate) fn group_status(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = vfio_group_status { argsz: size_of_u32::<vfio_group_status>(), flags: 0 };
    // SAFETY: the structure is whole, says its own size, and outlives the call.
    check(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_STATUS, &raw mut status) })?;
    Ok(status.flags)
}

/// Puts a group into a container.
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let container = container.as_raw_fd();
    // SAFETY: the argument points to a descriptor's number that outlives the call.
    check(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw const container) })?;
    Ok(())
}

/// A new descriptor of one of a group's devices, closed when another program is executed.
pub(crate) fn open_device(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the argument is a string with its final zero that outlives the call.
    let fd = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
    let fd = check(fd)?;
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a device is: flags, number of regions, number of interrupt kinds.
pub(crate) fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let argsz = size_of_u32::<vfio_device_info>();
    let mut info = vfio_device_info { argsz, ..Default::default() };
    // SAFETY: the structure is whole, says its own size, and outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_INFO, &raw mut info) })?;
    Ok(info)
}

/// `struct vfio_region_info` of a region with whatever capabilities follow it, as words.
pub(crate) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u32>> {
    const HEADER_WORDS: usize = 8;
    const MOST_WORDS: usize = 4096;
    let mut words = vec![0_u32; HEADER_WORDS];
    loop {
        let bytes = words.len() * 4;
        words[0] = u32::try_from(bytes).map_err(io::Error::other)?;
        words[2] = index;
        let info = words.as_mut_ptr();
        // SAFETY: the buffer is as long as its first word says, which is what the kernel goes by.
        check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_REGION_INFO, info) })?;
        // The kernel says how much there would have been.
        let wanted = usize::try_from(words[0]).map_err(io::Error::other)?.div_ceil(4);
        if wanted <= words.len() {
            return Ok(words);
        }
        if wanted > MOST_WORDS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        words = vec![0; wanted];
    }
}

/// The flags and the number of one kind of a device's interrupts.
pub(crate) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<(u32, u32)> {
    let argsz = size_of_u32::<vfio_irq_info>();
    let mut info = vfio_irq_info { argsz, flags: 0, index, count: 0 };
    // SAFETY: the structure is whole, says its own size, and outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_IRQ_INFO, &raw mut info) })?;
    Ok((info.flags, info.count))
}

/// `VFIO_DEVICE_SET_IRQS`: flags, index, start and count, then `data`, one word for each.
pub(crate) fn set_irqs(device: BorrowedFd<'_>, header: [u32; 4], data: &[i32]) -> io::Result<()> {
    let argsz = u32::try_from((1 + header.len() + data.len()) * 4).map_err(io::Error::other)?;
    let mut words = vec![argsz];
    words.extend(header);
    words.extend(data.iter().map(|fd| u32::from_ne_bytes(fd.to_ne_bytes())));
    // SAFETY: the buffer is as long as its first word says, which is what the kernel goes by.
    check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_SET_IRQS, words.as_ptr()) })?;
    Ok(())
}

/// Resets a device by itself.
pub(crate) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_RESET) })?;
    Ok(())
}

/// What is reset together with a device: pairs of a group's number and segment, bus and function
/// as `struct vfio_pci_dependent_device` packs them.
pub(crate) fn hot_reset_info(device: BorrowedFd<'_>) -> io::Result<Vec<[u32; 2]>> {
    const MOST_DEVICES: usize = 1024;
    let mut words = vec![0_u32; 3];
    loop {
        words[0] = u32::try_from(words.len() * 4).map_err(io::Error::other)?;
        let info = words.as_mut_ptr();
        // SAFETY: the buffer is as long as its first word says, which is what the kernel goes by.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_HOT_RESET_INFO, info) };
        let count = usize::try_from(words[2]).map_err(io::Error::other)?;
        match check(result) {
            Ok(_) => return Ok(words[3..].as_chunks().0.to_vec()),
            Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => return Err(error),
            Err(error) if count > MOST_DEVICES || words.len() > 3 => return Err(error),
            Err(_) => words = vec![0; 3 + 2 * count],
        }
    }
}

/// Resets a device and all that are reset with it; their `groups` prove that they are ours.
pub(crate) fn hot_reset(device: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    let to_u32 = |number: usize| u32::try_from(number).map_err(io::Error::other);
    let mut words = vec![to_u32((3 + groups.len()) * 4)?, 0, to_u32(groups.len())?];
    words.extend(groups.iter().map(|fd| u32::from_ne_bytes(fd.as_raw_fd().to_ne_bytes())));
    // SAFETY: the buffer is as long as its first word says, which is what the kernel goes by.
    check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_HOT_RESET, words.as_ptr()) })?;
    Ok(())
}

/// Lets a container's devices read and write `memory` at `iova`. The kernel pins its pages until
/// they are unmapped or the container is gone.
pub(crate) fn map_dma(
    container: BorrowedFd<'_>,
    iova: u64,
    memory: &VolatileSlice<'_>,
) -> io::Result<()> {
    let guard = memory.ptr_guard_mut();
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of_u32::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: guard.as_ptr().expose_provenance() as u64,
        iova,
        size: memory.len() as u64,
    };
    // SAFETY: the structure is whole, says its own size, and outlives the call. A device may write
    // to the memory from now on: it is volatile, so nobody holds a reference into it, and its pages
    // are pinned, so that they are nobody else's even if the mapping goes away.
    check(unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_MAP_DMA, &raw const map) })?;
    Ok(())
}

/// Ends [`map_dma`]; returns how many bytes were mapped.
pub(crate) fn unmap_dma(container: BorrowedFd<'_>, iova: u64, size: u64) -> io::Result<u64> {
    let argsz = size_of_u32::<vfio_iommu_type1_dma_unmap>();
    let mut unmap = vfio_iommu_type1_dma_unmap { argsz, iova, size, ..Default::default() };
    // SAFETY: the structure is whole, says its own size without the data that only other flags
    // would have, and outlives the call.
    check(unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_UNMAP_DMA, &raw mut unmap) })?;
    Ok(unmap.size)
}

/// A part of a device's region, mapped. Nothing here reads or writes it: a guest does, through its
/// address.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<libc::c_void>,
    len_bytes: usize,
}

// SAFETY: it is an address and a length; nothing is ever read or written through it here.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len_bytes` from `offset` of the device's descriptor.
    pub(crate) fn new(device: impl AsFd, offset: u64, len_bytes: u64) -> io::Result<Self> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let len_bytes = usize::try_from(len_bytes).map_err(io::Error::other)?;
        let fd = device.as_fd().as_raw_fd();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: no address is asked for, so the kernel picks one that nothing uses.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), len_bytes, prot, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len_bytes })
    }

    /// Where it is in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.expose_provenance().get() as u64
    }

    /// How long it is.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `new`, with this length, and nothing here refers into it.
        let result = unsafe { libc::munmap(self.start.as_ptr(), self.len_bytes) };
        debug_assert_eq!(result, 0, "a mapping can be unmapped once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_the_documented_ones() {
        // As `strace` prints them.
        assert_eq!((GET_API_VERSION, DEVICE_SET_IRQS), (0x3b64, 0x3b6e));
        assert_eq!((IOMMU_MAP_DMA, IOMMU_UNMAP_DMA), (0x3b71, 0x3b72));
    }

    #[test]
    fn a_descriptor_that_is_no_vfio_one_is_refused_by_each_call() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fd = file.as_fd();
        assert!(api_version(fd).is_err());
        assert!(has_extension(fd, 3).is_err());
        assert!(set_iommu(fd, 3).is_err());
        assert!(group_status(fd).is_err());
        assert!(set_container(fd, fd).is_err());
        assert!(open_device(fd, c"0000:00:00.0").is_err());
        assert!(device_info(fd).is_err());
        assert!(region_info(fd, 0).is_err());
        assert!(irq_info(fd, 0).is_err());
        assert!(set_irqs(fd, [0; 4], &[]).is_err());
        assert!(reset(fd).is_err());
        assert!(hot_reset_info(fd).is_err());
        assert!(hot_reset(fd, &[fd]).is_err());
        assert!(unmap_dma(fd, 0, 4096).is_err());
        let mut bytes = [0; 16];
        assert!(map_dma(fd, 0, &VolatileSlice::from(&mut bytes[..])).is_err());
    }

    #[test]
    fn a_mapping_tells_where_and_how_long_it_is() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mapping = Mapping::new(&file, 4096, 4096).unwrap();
        assert_eq!((mapping.len_bytes(), mapping.address() % 4096), (4096, 0));
        assert!(Mapping::new(&file, 1, 4096).is_err());
    }
}
