//! Doorbells: guest writes that reach a backend without a stop in the VMM.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// The kernel's side of a kick. Implemented for `kvm_ioctls::VmFd`.
pub trait Doorbells: Send + Sync {
    /// From now on a guest's write of any length at `address` signals `kick` and nothing else.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses, for example because another eventfd is registered there.
    fn ring_at(&self, address: u64, kick: &EventFd) -> io::Result<()>;

    /// Ends [`Doorbells::ring_at`].
    ///
    /// # Errors
    ///
    /// Fails if the two were not registered.
    fn silence(&self, address: u64, kick: &EventFd) -> io::Result<()>;
}
