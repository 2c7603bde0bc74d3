//! The signals that end the process, as a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;

/// SIGTERM and SIGINT, taken from their usual course.
pub(super) struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals for the calling thread and all it starts; they come to the descriptor.
    pub(super) fn take() -> io::Result<Self> {
        Ok(Self(sys::signals(&[libc::SIGTERM, libc::SIGINT])?))
    }

    /// Whether one has come; it is left there, since the process ends by it.
    pub(super) fn pending(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
