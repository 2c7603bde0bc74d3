//! A host program's end of a connection: the stream, what waits to be written to it, and what it
//! is polled for.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use backend_daemon::device::{Interest, Sources, Token};
use backend_daemon::ring::{self, Segment};
use rustix::net::{RecvFlags, SendFlags};

use crate::handshake::{self, LINE_BYTES, Line, Progress};
use crate::outbox::Outbox;

/// The socket of one host program. Never blocks.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
    outbox: Outbox,
    line: Line,
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
    /// Takes over a non-blocking `stream` and has it polled for `interest`.
    ///
    /// # Errors
    ///
    /// Fails if the stream can't be registered.
    pub fn watch(
        stream: UnixStream,
        token: Token,
        interest: Interest,
        sources: &mut dyn Sources,
    ) -> io::Result<Self> {
        sources.add(stream.as_fd(), token, interest)?;
        let (outbox, line, shut) = (Outbox::default(), Line::default(), (false, false));
        Ok(Self { stream, outbox, line, watched: Some(interest), shut })
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

    /// Whether all bytes for the program have been taken by its socket.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Reads on in the program's line, and not a byte beyond it.
    ///
    /// # Errors
    ///
    /// Fails if the program hung up in the middle of the line.
    pub fn read_line(&mut self) -> io::Result<Progress> {
        loop {
            let mut bytes = [0; LINE_BYTES];
            let len = match rustix::net::recv(&self.stream, &mut bytes, RecvFlags::PEEK) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, len)) => len,
                Err(rustix::io::Errno::AGAIN) => return Ok(Progress::More),
                Err(error) => return Err(error.into()),
            };
            let progress = self.line.take(&bytes[..len]);
            let ours = match progress {
                Progress::More => len,
                Progress::Port { consumed, .. } => consumed,
                Progress::Malformed => return Ok(progress),
            };
            let (_, read) =
                rustix::net::recv(&self.stream, &mut bytes[..ours], RecvFlags::empty())?;
            debug_assert_eq!(read, ours, "bytes that were peeked at can be read");
            if progress != Progress::More {
                return Ok(progress);
            }
        }
    }

    /// Tells the program that it is connected. Says whether its socket took the words: there was
    /// nothing in it yet, so one that does not is of no use.
    #[must_use]
    pub fn greet(&self, host_port: u32) -> bool {
        let answer = handshake::answer(host_port);
        let sent = rustix::net::send(&self.stream, answer.as_bytes(), SendFlags::NOSIGNAL);
        sent == Ok(answer.len())
    }

    /// Reads into guest memory.
    #[must_use]
    pub fn receive(&self, into: &[Segment]) -> Received {
        match ring::readv(self.stream.as_fd(), into) {
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

    /// Writes guest memory, if nothing waits before it. Says how many bytes were taken.
    ///
    /// # Errors
    ///
    /// Fails if the program takes no more at all.
    pub fn send(&self, from: &[Segment]) -> io::Result<usize> {
        if !self.outbox.is_empty() || from.is_empty() {
            return Ok(0);
        }
        match ring::writev(self.stream.as_fd(), from) {
            Err(error) if is_transient(&error) => Ok(0),
            other => other,
        }
    }

    /// Keeps bytes for when the program takes more.
    pub fn keep(&mut self, bytes: &[u8]) {
        self.outbox.push(bytes);
    }

    /// Writes what waits, as far as the program takes it. Says how many bytes were taken.
    ///
    /// # Errors
    ///
    /// Fails if the program takes no more at all.
    pub fn flush(&mut self) -> io::Result<usize> {
        self.outbox.flush(&mut &self.stream)
    }

    /// Forgets what waits, and says how many bytes it was.
    pub fn discard(&mut self) -> usize {
        self.outbox.clear()
    }

    /// Tells the program that the guest will send no more. Everything must be flushed.
    pub fn end_writing(&mut self) {
        debug_assert!(self.outbox.is_empty(), "bytes wait behind the end");
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

    fn shutdown(&self, how: Shutdown) {
        if let Err(error) = self.stream.shutdown(how) {
            log::debug!("a host program was gone before its end: {error}");
        }
    }

    /// The descriptor, for those who have to name it.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
