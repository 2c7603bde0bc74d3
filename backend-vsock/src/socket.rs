//! A host program's end of a connection: the stream, and what it is polled for.
//!
//! Bytes are taken in two steps, so that a successor can tell whether they were: [`Socket::peek`]
//! looks at them and moves the socket's peek offset on (`SO_PEEK_OFF`, socket(7)), and
//! [`Socket::consume`] takes them, which moves it back by as many.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use backend_daemon::device::{Interest, Sources, Token};
use backend_daemon::ring::Segment;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::handshake::LINE_BYTES;
use crate::sys;

/// The socket of one host program. Never blocks.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
    /// What it is polled for; `None` if it is not, since the program hung up for good. A hang-up
    /// can't be masked, so a socket that stayed registered would wake its worker for ever.
    watched: Option<Interest>,
    /// Which directions were shut down here, in `shutdown`'s words: reading, writing.
    shut: (bool, bool),
}

/// What a program has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes; at least one.
    Bytes(u32),
    /// Nothing for now.
    Nothing,
    /// It will send no more.
    Eof,
}

impl Socket {
    /// Takes over a non-blocking stream; it is not polled yet.
    ///
    /// # Errors
    ///
    /// Fails if the kernel can't keep track of what is peeked at.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        sys::set_peek_offset(stream.as_fd(), 0)?;
        Ok(Self { stream, watched: None, shut: (false, false) })
    }

    /// Has it polled.
    ///
    /// # Errors
    ///
    /// Fails if the stream can't be registered.
    pub fn watch(
        &mut self,
        token: Token,
        interest: Interest,
        sources: &mut dyn Sources,
    ) -> io::Result<()> {
        sources.add(self.stream.as_fd(), token, interest)?;
        self.watched = Some(interest);
        Ok(())
    }

    /// What it is polled for.
    #[must_use]
    pub fn watched(&self) -> Option<Interest> {
        self.watched
    }

    /// Has it polled for `interest` from now on, unless it is not polled any more.
    ///
    /// # Errors
    ///
    /// What `epoll_ctl` gives.
    pub fn set_interest(
        &mut self,
        token: Token,
        interest: Interest,
        sources: &mut dyn Sources,
    ) -> io::Result<()> {
        if self.watched.is_none_or(|watched| watched == interest) {
            return Ok(());
        }
        self.watched = Some(interest);
        sources.modify(self.stream.as_fd(), token, interest)
    }

    /// Ends the polling, for good.
    ///
    /// # Errors
    ///
    /// What `epoll_ctl` gives.
    pub fn unwatch(&mut self, token: Token, sources: &mut dyn Sources) -> io::Result<()> {
        match self.watched.take() {
            Some(_) => sources.remove(self.stream.as_fd(), token),
            None => Ok(()),
        }
    }

    /// Whether the program hung up, for good and both ways.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&now)) {
            Ok(_count) => fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR),
            Err(_error) => false,
        }
    }

    /// Looks at what may be the program's line, and gives how many bytes there are. None of them is
    /// taken, and [`will_consume`](Self::will_consume) has to say how many will be.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is nothing yet; fails if the program hung up.
    pub fn peek_line(&self, bytes: &mut [u8; LINE_BYTES]) -> io::Result<usize> {
        match rustix::net::recv(&self.stream, bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, len)) => Ok(len),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the peek offset to what will be consumed next.
    ///
    /// # Errors
    ///
    /// What `setsockopt` gives.
    pub fn will_consume(&self, len: usize) -> io::Result<()> {
        let offset = i32::try_from(len).map_err(|_error| io::ErrorKind::InvalidInput)?;
        sys::set_peek_offset(self.stream.as_fd(), offset)
    }

    /// Looks at the next bytes, into guest memory.
    #[must_use]
    pub fn peek(&self, into: &[Segment]) -> Received {
        match sys::peek(self.stream.as_fd(), into) {
            Ok(0) => Received::Eof,
            Ok(len) => u32::try_from(len).map_or(Received::Eof, Received::Bytes),
            Err(error) if is_transient(&error) => Received::Nothing,
            // The program closed its socket without having read everything: all that it sent
            // was read before the kernel says so.
            Err(error) => {
                log::debug!("a host program's stream broke off: {error}");
                Received::Eof
            }
        }
    }

    /// Takes so many bytes that were peeked at.
    ///
    /// # Errors
    ///
    /// Fails if they are not there: somebody else reads the socket.
    pub fn consume(&self, len_bytes: u32, scratch: &mut [u8]) -> io::Result<()> {
        let mut left = len_bytes as usize;
        while left > 0 {
            let most = left.min(scratch.len());
            match rustix::net::recv(&self.stream, &mut scratch[..most], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, read)) => left -= read,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes over a stream of which a predecessor was consuming `len_bytes`, and does the rest.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not tell how far that went.
    pub fn resume(stream: UnixStream, len_bytes: u32, scratch: &mut [u8]) -> io::Result<Self> {
        let left = u32::try_from(sys::peek_offset(stream.as_fd())?).unwrap_or(0);
        let socket = Self { stream, watched: None, shut: (false, false) };
        socket.consume(left.min(len_bytes), scratch)?;
        // What was peeked at last need not have been meant to be taken.
        sys::set_peek_offset(socket.as_fd(), 0)?;
        Ok(socket)
    }

    /// Tells the program that the guest will send no more. Everything must be flushed.
    pub fn end_writing(&mut self) {
        if !std::mem::replace(&mut self.shut.1, true) {
            self.shutdown(Shutdown::Write);
        }
    }

    /// Tells the program that the guest will receive no more.
    pub fn end_reading(&mut self) {
        if !std::mem::replace(&mut self.shut.0, true) {
            self.shutdown(Shutdown::Read);
        }
    }

    /// Ends it, for copies of the descriptor too: the supervisor may still have one.
    pub fn close(self) {
        self.shutdown(Shutdown::Both);
    }

    fn shutdown(&self, how: Shutdown) {
        if let Err(error) = self.stream.shutdown(how) {
            log::debug!("a host program was gone before its end: {error}");
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
