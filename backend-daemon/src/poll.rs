//! One epoll instance, as a worker's loop sees it: typed wake-ups, and the worker's own sources.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use epoll::{ControlOptions, Event, Events};

use crate::device::{Interest, QueueIndex, Sources, Token};
use crate::sys;

/// Why the loop woke up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// The protocol thread sent an order.
    Order,
    /// The guest kicked a queue.
    Kick(QueueIndex),
    /// One of the worker's own sources is ready.
    Source(Token),
}

/// How many events one wait takes; more wait for the next.
const BATCH: usize = 64;

/// The epoll instance of one thread.
pub(crate) struct Poll {
    epoll: OwnedFd,
    /// The tokens in use, so that an event of a removed source in the same batch is dropped.
    tokens: Vec<Token>,
}

impl Wake {
    fn encode(self) -> u64 {
        let (kind, value) = match self {
            Self::Order => (0, 0),
            Self::Kick(QueueIndex(queue)) => (1, u32::from(queue)),
            Self::Source(Token(token)) => (2, token),
        };
        kind << 32 | u64::from(value)
    }

    fn decode(data: u64) -> Option<Self> {
        let value = u32::try_from(data & u64::from(u32::MAX)).ok()?;
        match data >> 32 {
            0 => Some(Self::Order),
            1 => Some(Self::Kick(QueueIndex(u16::try_from(value).ok()?))),
            2 => Some(Self::Source(Token(value))),
            _ => None,
        }
    }
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: sys::epoll()?, tokens: Vec::new() })
    }

    /// Waits for `wake` until `fd` can be read.
    pub(crate) fn add(&mut self, fd: BorrowedFd<'_>, wake: Wake) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, Event::new(Events::EPOLLIN, wake.encode()))
    }

    pub(crate) fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Event::new(Events::empty(), 0))
    }

    /// Puts what happened into `wakes`, which must be empty; blocks until something happens, if
    /// it may.
    pub(crate) fn wait(&mut self, wakes: &mut Vec<Wake>, may_block: bool) -> io::Result<()> {
        let timeout_ms = if may_block { -1 } else { 0 };
        let mut events = [Event::new(Events::empty(), 0); BATCH];
        let count = loop {
            match epoll::wait(self.epoll.as_raw_fd(), timeout_ms, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        wakes.extend(events[..count].iter().filter_map(|event| Wake::decode(event.data)));
        Ok(())
    }

    /// Whether `token` is (still) registered.
    pub(crate) fn knows(&self, token: Token) -> bool {
        self.tokens.contains(&token)
    }

    fn control(&self, what: ControlOptions, fd: BorrowedFd<'_>, event: Event) -> io::Result<()> {
        epoll::ctl(self.epoll.as_raw_fd(), what, fd.as_raw_fd(), event)
    }
}

impl Sources for Poll {
    fn add(&mut self, fd: BorrowedFd<'_>, token: Token, interest: Interest) -> io::Result<()> {
        if self.knows(token) {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        let event = Event::new(events(interest), Wake::Source(token).encode());
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, event)?;
        self.tokens.push(token);
        Ok(())
    }

    fn modify(&mut self, fd: BorrowedFd<'_>, token: Token, interest: Interest) -> io::Result<()> {
        let event = Event::new(events(interest), Wake::Source(token).encode());
        self.control(ControlOptions::EPOLL_CTL_MOD, fd, event)
    }

    fn remove(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.tokens.retain(|known| *known != token);
        self.remove(fd.as_fd())
    }
}

fn events(interest: Interest) -> Events {
    match interest {
        Interest::Read => Events::EPOLLIN,
        Interest::Write => Events::EPOLLOUT,
        Interest::ReadWrite => Events::EPOLLIN | Events::EPOLLOUT,
        Interest::Nothing => Events::empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wake_survives_its_encoding() {
        for wake in [
            Wake::Order,
            Wake::Kick(QueueIndex(0)),
            Wake::Kick(QueueIndex(u16::MAX)),
            Wake::Source(Token(u32::MAX)),
        ] {
            assert_eq!(Wake::decode(wake.encode()), Some(wake));
        }
        assert_eq!(Wake::decode(3 << 32), None);
        assert_eq!(Wake::decode(1 << 32 | 1 << 16), None);
    }
}
