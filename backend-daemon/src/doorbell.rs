//! The event descriptors of a queue: the guest's kick, our interrupt, our report of an error.
//!
//! They come from the frontend, who may have sent anything that is a descriptor; nothing here may
//! block or spin because of that.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What reading a doorbell gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It was rung, or somebody else heard it first.
    Ring,
    /// It will never ring again.
    Dead,
}

/// One event descriptor, set to never block.
#[derive(Debug)]
pub(crate) struct Doorbell(File);

impl Doorbell {
    /// One of our own.
    pub(crate) fn make() -> io::Result<Self> {
        Ok(Self(File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// One that the frontend sent.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let flags = fcntl_getfl(&file)?;
        fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
        Ok(Self(file))
    }

    /// Takes what was rung so far.
    pub(crate) fn hear(&self) -> Heard {
        let mut count = [0; 8];
        match (&self.0).read(&mut count) {
            Ok(1..) => Heard::Ring,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Heard::Ring
            }
            Ok(0) | Err(_) => Heard::Dead,
        }
    }

    /// Rings. A counter that is full has been rung and not heard yet, which is as good.
    pub(crate) fn ring(&self) -> io::Result<()> {
        match (&self.0).write(&1_u64.to_ne_bytes()) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
