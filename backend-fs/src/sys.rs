#![expect(unsafe_code, reason = "mount system calls, and guest memory as another crate maps it")]
//! System calls that no safe wrapper has, and guest memory as virtiofsd wants it.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use backend_daemon::ring::Chain;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtiofsd::descriptor_utils::{self, Reader, Writer};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
};

/// `unshare(CLONE_NEWNS)`: a mount namespace, root and working directory of the caller's own.
pub(crate) fn own_mount_namespace() -> io::Result<()> {
    // SAFETY: no `FILES` among the flags, so all threads go on sharing their descriptors.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?)
}

/// `unshare(CLONE_FS)`: a working directory and umask of the calling thread's own.
pub(crate) fn own_working_directory() -> io::Result<()> {
    // SAFETY: no `FILES` among the flags, so all threads go on sharing their descriptors.
    Ok(unsafe { unshare_unsafe(UnshareFlags::FS) }?)
}

/// `mount_setattr(2)`: adds attributes to a mount and to all mounts below it.
pub(crate) fn add_mount_attributes(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    let change =
        libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let change_bytes = size_of::<libc::mount_attr>();
    // SAFETY: the path is an empty C string, and `change` is a structure of `change_bytes` bytes
    // that the kernel reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            change_bytes,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Why the guest's memory can't be described for virtiofsd.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ViewError {
    #[error("a region of the guest's memory is no proper mapping")]
    Region(#[from] MmapRegionError),
    #[error("a region of the guest's memory lies at the end of the address space")]
    Address,
    #[error("the regions of the guest's memory are no table")]
    Table(#[from] GuestRegionCollectionError),
    #[error("a buffer")]
    Buffer(#[from] descriptor_utils::Error),
}

/// A chain as virtiofsd reads and writes it.
///
/// virtiofsd's types want a bitmap of its own kind beside each memory region; the daemon's
/// regions have none. A view describes the same mappings a second time, for one request.
///
/// Invariant: the regions in `memory` are mappings that the chain's guard keeps alive, and
/// `memory` itself is never given away, so that nothing made from it outlives the chain.
pub(crate) struct View<'chain> {
    memory: GuestMemoryMmap<BitmapMmapRegion>,
    chain: &'chain Chain,
}

impl<'chain> View<'chain> {
    /// Describes the memory of a chain.
    pub(crate) fn of(chain: &'chain Chain) -> Result<Self, ViewError> {
        let mut twins = Vec::with_capacity(chain.memory().num_regions());
        for region in chain.memory().iter() {
            let size = region.size();
            let builder = MmapRegionBuilder::new(size)
                .with_mmap_prot(region.prot())
                .with_mmap_flags(region.flags());
            // SAFETY: the region is a mapping of `size` bytes at this address, and stays one
            // as long as the chain lives, which the view does not outlive (the type's invariant).
            let builder = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) };
            let twin = GuestRegionMmap::new(builder.build()?, region.start_addr());
            twins.push(twin.ok_or(ViewError::Address)?);
        }
        Ok(Self { memory: GuestMemoryMmap::from_regions(twins)?, chain })
    }

    /// What the guest wrote.
    pub(crate) fn reader(&self) -> Result<Reader<'_>, ViewError> {
        Ok(Reader::new(&self.memory, self.chain.descriptor_chain())?)
    }

    /// Where the answer goes.
    pub(crate) fn writer(&self) -> Result<Writer<'_>, ViewError> {
        Ok(Writer::new(&self.memory, self.chain.descriptor_chain())?)
    }
}
