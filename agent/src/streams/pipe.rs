//! The agent's end of a pipe or pseudo-terminal, as an asynchronous source or sink of bytes.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::{Errno, read, write},
};
use tokio::{io::unix::AsyncFd, sync::watch};

use crate::sys;

/// One end that the agent holds.
#[derive(Clone, Debug)]
pub(crate) struct Pipe(Arc<AsyncFd<OwnedFd>>);

impl Pipe {
    /// Takes the descriptor over.
    ///
    /// # Errors
    ///
    /// Fails if it can't be made non-blocking or can't be polled.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(sys::watched(fd)?)))
    }

    /// The descriptor, for terminal calls.
    pub(crate) fn fd(&self) -> impl AsFd + '_ {
        self.0.get_ref().as_fd()
    }

    /// Reads some bytes; 0 is the end. Loses nothing when cancelled.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(read(fd.get_ref(), &mut *buffer)?)) {
                // The master of a terminal tells so that nobody has the other side open any more.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                    return Ok(0);
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes some bytes. Nothing is written when cancelled.
    pub(crate) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(write(fd.get_ref(), bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }
}

/// A pipe that may come later (a terminal exists only once its process does) and may go.
#[derive(Clone, Debug)]
pub(crate) enum Slot {
    /// Not there yet.
    Awaited,
    /// There.
    Open(Pipe),
    /// Closed, or it will never come.
    Gone,
}

/// Waits until a slot is decided; nothing if its pipe is gone.
pub(crate) async fn opened(mut slot: watch::Receiver<Slot>) -> Option<Pipe> {
    // The sender lives in the stream that the caller holds; if it doesn't, the pipe is gone.
    let decided = slot.wait_for(|slot| !matches!(slot, Slot::Awaited)).await.ok()?;
    match &*decided {
        Slot::Open(pipe) => Some(pipe.clone()),
        Slot::Awaited | Slot::Gone => None,
    }
}
