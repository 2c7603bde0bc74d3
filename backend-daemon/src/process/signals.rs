//! The signals that end the process, or have it look around, as a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;

/// SIGTERM, SIGINT and perhaps SIGHUP, taken from their usual course.
pub(super) struct Signals(OwnedFd);

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// To end.
    End,
    /// To look again at what the device stands for.
    Refresh,
}

impl Signals {
    /// Blocks the signals for the calling thread and all it starts; they come to the descriptor.
    pub(super) fn take(refreshes: bool) -> io::Result<Self> {
        let all = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
        Ok(Self(sys::signals(if refreshes { &all } else { &all[..2] })?))
    }

    /// Takes a signal that has come.
    pub(super) fn next(&self) -> Option<Asked> {
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        let len = rustix::io::read(&self.0, &mut bytes).ok()?;
        let [number, ..] = bytes[..len].as_chunks().0 else { return None };
        let is_hangup = i32::from_ne_bytes(*number) == libc::SIGHUP;
        Some(if is_hangup { Asked::Refresh } else { Asked::End })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
