//! Eventfds as borrowed descriptors, which vmm-sys-util does not offer.
#![expect(unsafe_code, reason = "a raw descriptor is borrowed from its owner")]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`, for as long as `event` is there.
pub(crate) fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open and not -1 because `event` owns it, and it stays open for the
    // lifetime of the result because `event` is borrowed for that long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
