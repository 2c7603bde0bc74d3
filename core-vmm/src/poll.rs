//! The control thread's epoll set: descriptors that are watched for input, by token.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use epoll::{ControlOptions, Event, Events};

/// An epoll set. It watches descriptors but does not own them.
#[derive(Debug)]
pub struct Poller {
    fd: RawFd,
}

/// The most events that one wait gives.
const BATCH: usize = 32;

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    ///
    /// Fails if the host has no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: epoll::create(true)? })
    }

    /// Watches `fd` for input, or for its other end being gone.
    ///
    /// # Errors
    ///
    /// Fails if it is no descriptor that can be watched.
    pub fn add(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, Events::EPOLLIN, token)
    }

    /// Watches `fd` for input no longer, or again.
    ///
    /// # Errors
    ///
    /// Fails if it is not watched.
    pub fn set_enabled(&self, fd: &impl AsRawFd, token: u64, enabled: bool) -> io::Result<()> {
        let events = if enabled { Events::EPOLLIN } else { Events::empty() };
        self.control(ControlOptions::EPOLL_CTL_MOD, fd, events, token)
    }

    /// Forgets `fd`.
    ///
    /// # Errors
    ///
    /// Fails if it is not watched.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Events::empty(), 0)
    }

    fn control(
        &self,
        option: ControlOptions,
        fd: &impl AsRawFd,
        events: Events,
        token: u64,
    ) -> io::Result<()> {
        epoll::ctl(self.fd, option, fd.as_raw_fd(), Event::new(events, token))
    }

    /// Waits for events, at most for `most` if there is a limit, and gives their tokens.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does.
    pub fn wait(&self, most: Option<Duration>) -> io::Result<Vec<u64>> {
        const FOREVER_MS: i32 = -1;
        // Not a moment too early: what is waited for would be looked at over and over.
        let in_ms = |most: Duration| i32::try_from(most.as_millis() + 1).unwrap_or(i32::MAX);
        let most_ms = most.map_or(FOREVER_MS, in_ms);
        let mut events = [Event::new(Events::empty(), 0); BATCH];
        match epoll::wait(self.fd, most_ms, &mut events) {
            Ok(count) => Ok(events[..count].iter().map(|event| event.data).collect()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        if let Err(error) = epoll::close(self.fd) {
            log::error!("can't close an epoll set: {error}");
        }
    }
}
