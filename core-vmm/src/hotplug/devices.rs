//! Devices that come and go while the guest runs.
//!
//! ```text
//! add:     negotiate with the backend -> watch -> slot and BARs -> visible, UP -> interrupt -> Added
//! remove:  DOWN -> interrupt -> Done ... the guest's driver resets the device
//!            ... _EJ0 -> invisible -> DeviceRemoved         (its backend's connection is closed)
//!            ... _OST says no -> DeviceKept                 (as it was)
//!            ... reset of the guest -> DeviceRemoved
//! ```
//!
//! The conversation with a new backend is the control thread's, as with one that takes another's
//! place: it has as long, and a backend that dies or hangs in it leaves nothing behind but the
//! refusal. From then on the device is like any other: a backend that dies is lost, and the device
//! waits for another one or for its removal.
//!
//! An ejected device whose lost backend may still write to the guest's memory is held until that
//! has ended, as a reset would be: `RemoveDevice` of a device that is lost says so, as `Reconnect`
//! does.

use std::{io, os::fd::BorrowedFd};

use nacre_proto::vmm::{Event, NewDevice, NewDeviceKind};
use vfio::Opened;
use vm_memory::GuestMemoryMmap;

use crate::{
    devices::{DeviceKey, Devices, DevicesError, boot::virtio_config},
    pci::PciAddress,
    supervisor::Descriptors,
};

/// Puts `new` on a bus, for which `descriptors` came along; the guest is to be told then. `watch`
/// begins to watch its descriptor.
///
/// # Errors
///
/// Fails if its backend does not fit, or there is no room; nothing is left of it then.
///
/// # Panics
///
/// Panics if fewer or more descriptors came along than belong to it: `command` has checked it.
pub fn add(
    (devices, memory): (&mut Devices, &GuestMemoryMmap),
    new: NewDevice,
    descriptors: Descriptors,
    watch: impl FnOnce(DeviceKey, BorrowedFd<'_>) -> io::Result<()>,
) -> Result<PciAddress, DevicesError> {
    let device = match new.kind {
        NewDeviceKind::Virtio { device_type, queues, queue_size, config } => {
            let mut wanted = virtio_config(&new.id, device_type, (queues, queue_size), config);
            // The supervisor has seen the process ready.
            wanted.limits.negotiate = wanted.limits.reconnect;
            let [socket] = descriptors.exactly();
            devices.negotiate(wanted, socket.into())?
        }
        NewDeviceKind::Vfio { address } => {
            let [container, group, device] = descriptors.exactly();
            log::info!("device {} is {address} of the host", new.id);
            devices.assigned(&new.id, Opened { container, group, device }, memory)?
        }
    };
    device.takes(memory)?;
    devices.plug(device, watch)
}

/// What became of the devices that the guest was asked for, since the last time.
pub fn take_events(devices: &mut Devices) -> Vec<Event> {
    let kept = devices.take_answers();
    let mut events: Vec<_> = kept
        .into_iter()
        .map(|(device, status)| Event::DeviceKept { device, reason: reason(status) })
        .collect();
    events.extend(devices.remove_ejected().into_iter().map(removed));
    events
}

/// Ends all removals, at the guest's reset.
pub fn finish(devices: &mut Devices) -> Vec<Event> {
    devices.remove_leaving().into_iter().map(removed).collect()
}

fn removed(device: String) -> Event {
    Event::DeviceRemoved { device }
}

/// An `_OST` status in words (ACPI 6.5, table 6.32).
fn reason(status: u32) -> String {
    let words = match status {
        0x80 => "the guest can't eject it",
        0x81 => "the guest uses it",
        0x82 => "the guest finds it busy",
        0x83 => "the guest has something that depends on it",
        _ => "the guest refused",
    };
    format!("{words} (status {status:#x})")
}
