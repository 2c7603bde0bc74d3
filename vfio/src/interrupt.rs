//! A device's interrupts, each sent to an eventfd.
//!
//! One kind at a time: the kernel refuses MSI-X while INTx or MSI has an eventfd, so a kind is
//! switched off before another one is switched on. An INTx is masked by the kernel each time it
//! fires; a second eventfd, written when the guest has ended the interrupt, takes the mask away
//! (and the interrupt comes again if the device still asserts it).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
};
use vmm_sys_util::eventfd::EventFd;

use crate::device::Device;
use crate::sys;

/// In place of a descriptor: none.
const NOBODY: i32 = -1;

/// A kind of interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptKind {
    /// The legacy line.
    IntX,
    /// Messages by the MSI capability.
    Msi,
    /// Messages by the MSI-X table.
    MsiX,
    /// The host saw an error that the device can't recover from.
    Error,
    /// The host wants the device back.
    Request,
}

impl InterruptKind {
    /// How many kinds there are.
    pub(crate) const COUNT: u32 = VFIO_PCI_REQ_IRQ_INDEX + 1;

    fn index(self) -> u32 {
        match self {
            Self::IntX => VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => VFIO_PCI_REQ_IRQ_INDEX,
        }
    }

    pub(crate) fn at(self) -> usize {
        usize::try_from(self.index()).unwrap_or(usize::MAX)
    }
}

/// What VFIO says of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interrupt {
    pub(crate) flags: u32,
    pub(crate) count: u32,
}

/// Why an interrupt is not sent, or still is.
#[derive(Debug, thiserror::Error)]
#[error("the device's {kind:?} interrupts can't be {action}")]
pub struct InterruptError {
    kind: InterruptKind,
    action: &'static str,
    source: io::Error,
}

impl Device {
    /// How many interrupts of `kind` the device has.
    #[must_use]
    pub fn interrupts(&self, kind: InterruptKind) -> u32 {
        let interrupt = self.interrupt(kind);
        if interrupt.flags & VFIO_IRQ_INFO_EVENTFD == 0 { 0 } else { interrupt.count }
    }

    fn set(
        &self,
        (kind, action): (InterruptKind, &'static str),
        flags: u32,
        [start, count]: [u32; 2],
        fds: &[i32],
    ) -> Result<(), InterruptError> {
        let header = [flags, kind.index(), start, count];
        let set = sys::set_irqs(self.as_fd(), header, fds);
        set.map_err(|source| InterruptError { kind, action, source })
    }

    /// Sends the interrupts from number `first` on to these eventfds; one without is not sent. The
    /// first call for MSI or MSI-X decides how many the kernel sets aside.
    ///
    /// # Errors
    ///
    /// Fails if the device has not so many, another kind is on, or the host has none left.
    pub fn send_to(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<&EventFd>],
    ) -> Result<(), InterruptError> {
        let fds: Vec<i32> =
            events.iter().map(|event| event.map_or(NOBODY, AsRawFd::as_raw_fd)).collect();
        let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set((kind, "switched on"), flags, [first, count], &fds)
    }

    /// Sends none of a kind any more.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn silence(&self, kind: InterruptKind) -> Result<(), InterruptError> {
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set((kind, "switched off"), flags, [0, 0], &[])
    }

    /// Has the INTx unmasked whenever `ended` is written.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn unmask_on(&self, ended: &EventFd) -> Result<(), InterruptError> {
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
        self.set((InterruptKind::IntX, "resampled"), flags, [0, 1], &[ended.as_raw_fd()])
    }
}
