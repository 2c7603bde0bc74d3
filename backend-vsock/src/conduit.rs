//! A pipe through which bytes reach a host program's socket, so that a successor can tell how many
//! did: what was put in, less what is still there. The kernel finishes a call that does not wait
//! before a signal ends the process, so no byte is ever between the two.
//!
//! There is one pipe, empty between two deliveries. Its pages are the pipe's own: a socket that
//! takes them by reference never sees what the ledger's area holds later.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, ioctl_fionread, read};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use vm_memory::VolatileSlice;

use crate::sys;

/// The most bytes at a time: what a pipe usually holds.
pub const CONDUIT_BYTES: u32 = 64 * 1024;

/// The pipe.
#[derive(Debug)]
pub struct Conduit {
    read: OwnedFd,
    write: OwnedFd,
    is_adopted: bool,
}

impl Conduit {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// What `pipe2` gives.
    pub fn make() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { read, write, is_adopted: false })
    }

    /// The one that a predecessor left.
    #[must_use]
    pub fn adopt(read: OwnedFd, write: OwnedFd) -> Self {
        Self { read, write, is_adopted: true }
    }

    /// Both ends: to read from, to write to.
    #[must_use]
    pub fn ends(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.read.as_fd(), self.write.as_fd())
    }

    /// How many bytes a predecessor left in it; nothing if it had another one.
    ///
    /// # Errors
    ///
    /// What the system call gives.
    pub fn left(&self) -> io::Result<Option<u32>> {
        if !self.is_adopted {
            return Ok(None);
        }
        Ok(Some(u32::try_from(ioctl_fionread(&self.read)?).unwrap_or(u32::MAX)))
    }

    /// Copies memory into it. Says how many bytes fit.
    ///
    /// # Errors
    ///
    /// What the system call gives.
    pub fn fill(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<u32> {
        let filled = sys::writev(self.write.as_fd(), pieces)?;
        u32::try_from(filled).map_err(|_error| io::ErrorKind::InvalidData.into())
    }

    /// Moves up to `len_bytes` bytes into a socket that does not block. Says how many it took.
    ///
    /// # Errors
    ///
    /// Fails if the socket takes no more at all.
    pub fn pass(&self, to: BorrowedFd<'_>, len_bytes: u32) -> io::Result<u32> {
        let flags = SpliceFlags::NONBLOCK;
        match splice(&self.read, None, to, None, len_bytes as usize, flags) {
            Ok(passed) => u32::try_from(passed).map_err(|_error| io::ErrorKind::InvalidData.into()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Empties it.
    ///
    /// # Errors
    ///
    /// What the system call gives.
    pub fn drain(&self) -> io::Result<()> {
        let mut scratch = [0; 4096];
        loop {
            match read(&self.read, &mut scratch) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
