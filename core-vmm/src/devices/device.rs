//! What can be put into a slot while the guest runs, and taken out again.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nacre_proto::vmm::{DeviceState, DeviceStatus};
use vm_memory::GuestMemoryMmap;

use super::DevicesError;
use crate::{
    passthrough::{AssignError, Assigned, Trouble},
    pci::{PciAddress, PciFunction},
    virtio::{RequestError, VirtioDevice},
};

/// A device, the function that the guest sees included.
///
/// All that it holds of the host (descriptors, KVM's memory slots, routes, ioeventfds) belongs to
/// it or to its function and goes with them: dropping both is the whole release. Before that the
/// function is taken off the bus, so that no vCPU comes in any more and none of its BARs is mapped.
pub enum Device {
    /// A virtio device, served by a process.
    Virtio(Box<VirtioDevice>),
    /// A device of the host's, reset and the host's again when it is dropped.
    Assigned(Box<Assigned>),
}

impl Device {
    /// The supervisor's name for it.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Virtio(device) => device.name(),
            Self::Assigned(device) => device.name(),
        }
    }

    /// What to attach to a bus.
    #[must_use]
    pub fn function(&self) -> Arc<dyn PciFunction> {
        match self {
            Self::Virtio(device) => device.function(),
            Self::Assigned(device) => device.function(),
        }
    }

    /// Readable when [`Device::process`] has something to do; always the same one, owned by the
    /// device.
    #[must_use]
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Virtio(device) => device.ready_fd(),
            Self::Assigned(device) => device.ready_fd(),
        }
    }

    /// It is at `address` from now on.
    pub fn placed(&self, address: PciAddress) {
        match self {
            Self::Virtio(_) => {}
            Self::Assigned(device) => device.placed(address.slot),
        }
    }

    /// Does what is to do. True if the guest is to give the device up, as the host wants it back.
    pub fn process(&mut self, memory: &GuestMemoryMmap) -> bool {
        match self {
            Self::Virtio(device) => {
                device.process(memory);
                false
            }
            Self::Assigned(device) => device.process() == Some(Trouble::Wanted),
        }
    }

    /// Notices that a backend is gone.
    pub fn look_after(&mut self) {
        match self {
            Self::Virtio(device) => device.look_after_backend(),
            Self::Assigned(_) => {}
        }
    }

    /// How it is, which the guest finds at `address`.
    #[must_use]
    pub fn status(&self, address: PciAddress) -> DeviceStatus {
        match self {
            Self::Virtio(device) => device.status(&address.to_string()),
            Self::Assigned(device) => DeviceStatus {
                id: device.name().to_owned(),
                address: address.to_string(),
                state: DeviceState::Passthrough,
                leaving: false,
                reconnects: 0,
            },
        }
    }

    /// Whether nobody writes to the guest's memory on its behalf that the VMM could not stop: only
    /// then may a guest that was reset run, or the device go.
    #[must_use]
    pub fn is_still(&self) -> bool {
        match self {
            Self::Virtio(device) => device.is_still(),
            // It is reset when it goes, and around a reset of the guest.
            Self::Assigned(_) => true,
        }
    }

    /// Why its backend was lost, if it was since the last time this was asked.
    pub fn take_loss(&mut self) -> Option<String> {
        match self {
            Self::Virtio(device) => device.take_loss(),
            Self::Assigned(_) => None,
        }
    }

    /// What served it and is lost has ended, and what that had asked the kernel for as well.
    pub fn predecessor_ended(&mut self, memory: &GuestMemoryMmap) {
        match self {
            Self::Virtio(device) => device.predecessor_ended(memory),
            Self::Assigned(_) => {}
        }
    }

    /// Back to power-on, with every vCPU stopped. A device of the host's reaches no memory until
    /// [`Device::resume`].
    ///
    /// # Errors
    ///
    /// Fails if a device of the host's may still write to the guest's memory.
    pub fn reset(&mut self) -> Result<(), DevicesError> {
        match self {
            Self::Virtio(device) => {
                device.reset();
                Ok(())
            }
            Self::Assigned(device) => device.reset().map_err(failed(device)),
        }
    }

    /// The guest's memory is as it is to be after a reset.
    ///
    /// # Errors
    ///
    /// Fails if the host does not allow a device to reach it.
    pub fn resume(&mut self, memory: &GuestMemoryMmap) -> Result<(), DevicesError> {
        match self {
            Self::Virtio(_) => Ok(()),
            Self::Assigned(device) => device.resume(memory).map_err(failed(device)),
        }
    }

    /// The guest has given it up: nobody is to write to its memory on the device's behalf.
    pub fn stop(&mut self) {
        match self {
            Self::Virtio(device) => device.reset(),
            // Its end resets it.
            Self::Assigned(_) => {}
        }
    }

    /// Has the backend stop and hang up.
    ///
    /// # Errors
    ///
    /// Fails if there is none, or it is lost over it.
    pub fn quiesce(&mut self) -> Result<(), RequestError> {
        match self {
            Self::Virtio(device) => device.quiesce(),
            Self::Assigned(_) => Err(RequestError::Absent),
        }
    }

    /// Gives it another backend.
    ///
    /// # Errors
    ///
    /// Fails if it has one, or the new one does not fit.
    pub fn reconnect(
        &mut self,
        socket: UnixStream,
        memory: &GuestMemoryMmap,
    ) -> Result<(), RequestError> {
        match self {
            Self::Virtio(device) => device.reconnect(socket, memory),
            Self::Assigned(_) => Err(RequestError::Absent),
        }
    }
}

pub(super) fn failed(device: &Assigned) -> impl FnOnce(AssignError) -> DevicesError + use<> {
    let id = device.name().to_owned();
    |source| DevicesError::Assign { id, source }
}
