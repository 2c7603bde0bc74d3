//! A container: an address space of the IOMMU, for the devices of the groups that are in it.
//!
//! It is the type 1 IOMMU interface in its second version, in which a range is unmapped as it was
//! mapped. Either it is opened here, or it comes ready from a supervisor, with its group in it and
//! the IOMMU type chosen.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vfio_bindings::bindings::vfio::{VFIO_API_VERSION, VFIO_TYPE1v2_IOMMU};
use vm_memory::VolatileSlice;

use crate::sys;

/// Where containers come from.
pub const PATH: &str = "/dev/vfio/vfio";

/// Why there is no container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// VFIO is not there, or not for this user.
    #[error("can't open {PATH} (is the module vfio_iommu_type1 loaded, and may this user?)")]
    Open(#[source] io::Error),
    /// The descriptor is something else.
    #[error("the descriptor is no VFIO container")]
    NoContainer(#[source] io::Error),
    /// A kernel of another time.
    #[error("VFIO speaks version {0} of its API, not {VFIO_API_VERSION}")]
    Version(i32),
    /// No IOMMU of the kind that is needed.
    #[error("VFIO has no type 1 IOMMU here: is an IOMMU there and switched on in the kernel?")]
    NoIommu,
    /// The first group's IOMMU does not do it.
    #[error("the IOMMU can't be set up for the group")]
    Iommu(#[source] io::Error),
}

/// A container.
#[derive(Debug)]
pub struct Container(File);

impl Container {
    /// Opens one. It is of no use before a group is in it and the IOMMU is chosen.
    ///
    /// # Errors
    ///
    /// Fails if VFIO is not there, not permitted, or has no IOMMU of type 1.
    pub fn open() -> Result<Self, ContainerError> {
        let file = File::options().read(true).write(true).open(PATH);
        Self::checked(file.map_err(ContainerError::Open)?)
    }

    /// Takes over one that a supervisor made ready.
    ///
    /// # Errors
    ///
    /// Fails if it is no container, or one of another time.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, ContainerError> {
        Self::checked(fd.into())
    }

    fn checked(file: File) -> Result<Self, ContainerError> {
        let version = sys::api_version(file.as_fd()).map_err(ContainerError::NoContainer)?;
        if u32::try_from(version) != Ok(VFIO_API_VERSION) {
            return Err(ContainerError::Version(version));
        }
        match sys::has_extension(file.as_fd(), VFIO_TYPE1v2_IOMMU) {
            Ok(true) => Ok(Self(file)),
            Ok(false) => Err(ContainerError::NoIommu),
            Err(error) => Err(ContainerError::NoContainer(error)),
        }
    }

    /// Chooses the IOMMU's type, when the first group is in the container.
    ///
    /// # Errors
    ///
    /// Fails if the group's IOMMU does not do it.
    pub fn choose_iommu(&self) -> Result<(), ContainerError> {
        sys::set_iommu(self.as_fd(), VFIO_TYPE1v2_IOMMU).map_err(ContainerError::Iommu)
    }

    pub(crate) fn map(&self, iova: u64, memory: &VolatileSlice<'_>) -> io::Result<()> {
        sys::map_dma(self.as_fd(), iova, memory)
    }

    pub(crate) fn unmap(&self, iova: u64, len_bytes: u64) -> io::Result<()> {
        match sys::unmap_dma(self.as_fd(), iova, len_bytes)? {
            unmapped if unmapped == len_bytes => Ok(()),
            unmapped => Err(io::Error::other(format!("it unmapped {unmapped:#x} bytes"))),
        }
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Container> for OwnedFd {
    fn from(container: Container) -> Self {
        container.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_no_container_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let refused = Container::from_fd(null.into());
        assert!(matches!(refused, Err(ContainerError::NoContainer(_))));
    }
}
