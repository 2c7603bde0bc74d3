#![expect(unsafe_code, reason = "an eventfd that the vhost crate wants only lends its number")]
//! The test driver's one raw descriptor.

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an eventfd, for as long as the eventfd is borrowed.
pub(super) fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}
