//! Passing a host's PCI device through to a guest, as far as VFIO has a part in it.
//!
//! ```text
//! supervisor:  group  sysfs --> IOMMU group --> viable? --> container, group, device (descriptors)
//! VMM:         container + dma   which guest memory the device reaches
//!              device            its regions, interrupts, resets
//!              config_space      what the guest sees of its registers
//!              bar               what of its memory the guest reaches without a trap
//! ```
//!
//! It is the interface of groups and containers. The newer one (iommufd and a character device for
//! each device) is switched off in every kernel that this project is tested on, and left out.
//!
//! The structures and numbers are those of `vfio-bindings`. The calls are our own, in `sys`: what
//! `vfio-ioctls` offers in the release that goes with this workspace opens container and group by
//! itself, where our VMM gets all three descriptors from its supervisor, and reads sysfs when a
//! device is dropped, which a jailed process can't.
//!
//! What the device and its firmware say is checked like what comes from anybody else. Nothing here
//! knows KVM or a guest's address space beyond numbers.

pub mod address;
pub mod bar;
pub mod capability;
pub mod config_space;
pub mod container;
pub mod device;
pub mod dma;
pub mod group;
pub mod interrupt;
pub mod msix;
mod policy;
mod sys;

pub use address::{HostAddress, HostAddressError};
pub use bar::{Area, Bar};
pub use container::{Container, ContainerError};
pub use device::{Device, DeviceError, Region, RegionIndex};
pub use dma::{DmaError, DmaMap, DmaRange};
pub use group::{Group, GroupError, Opened, Sysfs};
pub use interrupt::InterruptKind;
pub use sys::{IOCTLS_AT_RUN_TIME, IOCTLS_OF_DRIVERS, Mapping};
