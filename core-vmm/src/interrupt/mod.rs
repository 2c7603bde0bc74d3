//! Interrupts from devices to the guest, without the VMM in between.
//!
//! KVM's in-kernel interrupt controllers know numbered lines (GSIs). The first 24 are the pins of
//! the IOAPIC and the PIC; the rest are given out here, each with an MSI message behind it. An
//! eventfd bound to a GSI (an irqfd) raises it whenever somebody writes to it: the backend holds
//! the other end.
//!
//! ```text
//! MsiRouter   one per VM: GSI --> message, the whole table told to KVM at each change
//! Vectors     one per function: eventfd --> vector --> GSI, bound while the guest lets it fire
//! ```
//!
//! KVM stands behind [`Irqchip`], so everything here is tested without it.

mod kvm;
mod msi;
mod sys;
mod vectors;

use std::io;

use vmm_sys_util::eventfd::EventFd;

pub use crate::pci::msix::MsiMessage;
pub(crate) use sys::descriptor;

pub use msi::{MAX_GSI_COUNT, MsiRouter, RouteError};
pub use vectors::{NO_VECTOR, SourceIndex, Vectors};

/// A numbered interrupt line of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// One MSI line of the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiRoute {
    /// The line.
    pub gsi: Gsi,
    /// What it sends.
    pub message: MsiMessage,
}

/// The in-kernel interrupt controllers, as far as device interrupts need them.
///
/// Implemented for `kvm_ioctls::VmFd`.
pub trait Irqchip: Send + Sync {
    /// Replaces the routing table: the fixed routes of the pins, and `routes`.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses a route; the old table then stays.
    fn set_routes(&self, routes: &[MsiRoute]) -> io::Result<()>;

    /// Raises `gsi` whenever `event` is written, beginning with what it holds already.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    fn bind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()>;

    /// Ends [`Irqchip::bind`]; writes to `event` then accumulate.
    ///
    /// # Errors
    ///
    /// Fails if the two were not bound.
    fn unbind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()>;
}
