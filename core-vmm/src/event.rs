//! What the guest does to the machine as a whole, told by a vCPU thread to the control thread.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vcpu::gate::Gate;

/// Something that a vCPU, or a device it wrote to, can't go on from by itself.
#[derive(Debug)]
pub enum GuestEvent {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// There is news of a PCI function that the guest was asked for.
    PciHotplug,
    /// The guest's kernel reported a panic.
    Panic,
    /// The guest gave up RAM, or said what it makes of RAM that comes or goes.
    Memory,
    /// The guest did something with vCPUs that come or go; the controller knows what.
    Cpus,
    /// A vCPU stopped for a reason the guest can't recover from.
    Crash {
        /// Which vCPU.
        vcpu: u32,
        /// Why, in words.
        reason: String,
    },
    /// The host failed a vCPU.
    Failed {
        /// Which vCPU.
        vcpu: u32,
        /// Why, in words: the chain of errors on one line.
        reason: String,
    },
}

/// The sending end, shared by vCPU threads and devices.
#[derive(Debug)]
pub struct Notifier {
    sender: Sender<GuestEvent>,
    wake: EventFd,
    gate: Arc<Gate>,
}

/// The receiving end, the control thread's.
#[derive(Debug)]
pub struct Mailbox {
    receiver: Receiver<GuestEvent>,
    wake: EventFd,
}

/// A pair; `gate` is the one of the vCPUs.
///
/// # Errors
///
/// Fails if the host has no descriptors left.
pub fn channel(gate: Arc<Gate>) -> io::Result<(Arc<Notifier>, Mailbox)> {
    let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let (sender, receiver) = mpsc::channel();
    let notifier = Notifier { sender, wake: wake.try_clone()?, gate };
    Ok((Arc::new(notifier), Mailbox { receiver, wake }))
}

impl Notifier {
    /// Tells the control thread and keeps the calling vCPU from going back to the guest: what
    /// follows a power-off or reset in the guest's code was never meant to run.
    pub fn raise(&self, event: GuestEvent) {
        self.gate.hold();
        self.notify(event);
    }

    /// Tells the control thread; the calling vCPU goes on in the guest meanwhile.
    pub fn notify(&self, event: GuestEvent) {
        if self.sender.send(event).is_err() {
            log::debug!("an event after the end of the control loop");
        }
        if let Err(error) = self.wake.write(1) {
            log::error!("can't wake the control loop: {error}");
        }
    }
}

impl Mailbox {
    /// Readable when there may be an event.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The oldest event that is waiting.
    #[must_use]
    pub fn take(&self) -> Option<GuestEvent> {
        // The counter only wakes; the channel has the truth.
        self.wake.read().ok();
        self.receiver.try_recv().ok()
    }

    /// Forgets what is waiting, for a reset: it is about the run before.
    pub fn clear(&self) {
        while self.take().is_some() {}
    }
}
