//! A PCI device of the host's, passed through to the guest by VFIO.
//!
//! ```text
//!            vCPU threads                        control thread
//!   .------------------------------.   .------------------------------------.
//!   | AssignedFunction: PciFunction|   | Assigned                           |
//!   |  config space by policy      |   |  DMA mappings of the guest's RAM   |
//!   |  MSI-X table, MSI            |   |  resets, the host's wishes         |
//!   |  BARs: windows, or trapped   |   |  KVM's knowledge of the group      |
//!   `------------------------------'   `------------------------------------'
//! ```
//!
//! To the bus it is a function like any other. What differs: its BARs are the device's own memory,
//! shown to the guest through KVM's memory slots, and it writes to the guest's memory by itself,
//! which is why all of it is pinned and mapped in the IOMMU. BARs of other devices are not: devices
//! can't write to each other.
//!
//! # How to use it
//!
//! ```text
//! let services = Services::new(vm, slots, router);                  // one of a VM
//! let opened = vfio::group::open(&Sysfs::default(), address)?;      // or three descriptors
//! let mut device = Assigned::new(id, opened, &services, &memory)?;  // pins all of `memory`
//! let slot = bus.attach(device.function())?;                        // cold, or hot-added
//! device.placed(slot);                                              // its line has a pin then
//! device.add_memory(&region)?; device.remove_memory(start, len)?;   // RAM comes and goes
//! device.reset(); bus.reset(); ...; device.resume(&memory)?;        // around a reset of the VM
//! bus.detach(slot)?; drop(device);                                  // reset, and the host's again
//! ```
//!
//! `Assigned` needs nothing that a jailed control thread may not do; only opening a device does.

mod device;
mod function;
mod interrupts;
mod kvm;
pub mod line;
mod sys;

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use device::{Assigned, Trouble};

use self::kvm::KvmVfio;
use crate::interrupt::MsiRouter;
use crate::memory::slots::{NoSlot, Slots};

/// What passed-through devices need of the VM.
#[derive(Clone)]
pub struct Services {
    vm: Arc<VmFd>,
    slots: Slots,
    router: Arc<MsiRouter>,
    kvm: Arc<KvmVfio>,
}

impl Services {
    /// Those of one VM, for all its devices.
    #[must_use]
    pub fn new(vm: &Arc<VmFd>, slots: &Slots, router: &Arc<MsiRouter>) -> Self {
        Self {
            vm: Arc::clone(vm),
            slots: slots.clone(),
            router: Arc::clone(router),
            kvm: Arc::new(KvmVfio::new(Arc::clone(vm))),
        }
    }
}

/// Why a device can't be passed through, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum AssignError {
    /// It can't be given away.
    #[error("the device can't be opened")]
    Open(#[from] vfio::GroupError),
    /// Its container.
    #[error("no container for the device")]
    Container(#[from] vfio::ContainerError),
    /// The device itself.
    #[error("the device does not answer")]
    Device(#[from] vfio::DeviceError),
    /// The guest's memory.
    #[error("the device can't reach the guest's memory")]
    Dma(#[from] vfio::DmaError),
    /// A piece of the guest's memory that has no address.
    #[error("guest memory at {0:#x} is unusable")]
    Memory(u64),
    /// Its errors or the host's wishes.
    #[error("the device's interrupts")]
    Interrupt(#[from] vfio::interrupt::InterruptError),
    /// Too many windows.
    #[error("no memory slot for the device's registers")]
    Slot(#[from] NoSlot),
    /// KVM.
    #[error("KVM does not take the device's group")]
    Kvm(#[source] io::Error),
    /// No descriptors or the like.
    #[error("can't make {what}")]
    Host {
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Lets this process pin as much memory as it may let itself: each device pins all of the guest's
/// RAM, and the kernel counts it once for each. Nothing but a device's mappings is ever pinned here:
/// the filters of system calls know no `mlock`.
pub fn allow_pinning() {
    let unlimited = Rlimit { current: None, maximum: None };
    if setrlimit(Resource::Memlock, unlimited).is_ok() {
        return;
    }
    let Rlimit { maximum, .. } = getrlimit(Resource::Memlock);
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum }) {
        log::warn!("can't raise the limit of locked memory: {error}");
    }
}

fn event() -> Result<EventFd, AssignError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| AssignError::Host { what: "an eventfd", source })
}
