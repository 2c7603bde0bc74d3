//! One connection whole: its state, its name, its host program.

use std::io;

use backend_daemon::device::{Interest, Sources, Token};

use crate::connection::{Connection, Event, Phase};
use crate::packet::Ports;
use crate::socket::Socket;

/// One connection with its host program's socket.
#[derive(Debug)]
pub struct Entry {
    /// Its state.
    pub machine: Connection,
    /// Its name, once it has one.
    pub ports: Option<Ports>,
    /// The host program's end, until that is closed.
    pub socket: Option<Socket>,
    /// The host program may have sent something that is not read yet.
    pub readable: bool,
    token: Token,
    /// Whether it waits for its turn.
    queued: bool,
}

impl Entry {
    /// A connection with a socket that is polled under this name.
    #[must_use]
    pub fn new(machine: Connection, ports: Option<Ports>, token: Token, socket: Socket) -> Self {
        Self { machine, ports, socket: Some(socket), readable: false, token, queued: false }
    }

    /// The name of its event source.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// Takes note of whether it waits for its turn; gives whether it did.
    pub fn set_queued(&mut self, queued: bool) -> bool {
        std::mem::replace(&mut self.queued, queued)
    }

    /// Writes what waits for the host program.
    pub fn flush(&mut self) {
        let Some(socket) = &mut self.socket else { return };
        match socket.flush() {
            Ok(len) => self.forwarded(len),
            Err(error) => {
                log::debug!("a host program takes no more: {error}");
                self.deafen();
            }
        }
    }

    /// The host program takes no more: forget what waits for it.
    pub fn deafen(&mut self) {
        self.machine.apply(Event::HostDeaf);
        let lost = self.socket.as_mut().map_or(0, Socket::discard);
        self.forwarded(lost);
    }

    /// Takes note that so many bytes of the guest left our buffer.
    pub fn forwarded(&mut self, len: usize) {
        // The credit bounds the buffer to far less.
        self.machine.credit.forward(u32::try_from(len).unwrap_or(u32::MAX));
    }

    /// Does to the host program's socket what follows from the machine's state.
    ///
    /// # Errors
    ///
    /// What `epoll_ctl` gives.
    pub fn settle(&mut self, sources: &mut dyn Sources) -> io::Result<()> {
        let Some(socket) = &mut self.socket else { return Ok(()) };
        if socket.is_flushed() {
            self.machine.apply(Event::Flushed);
        }
        let guest = self.machine.guest_shut();
        if guest.send && socket.is_flushed() {
            socket.end_writing();
        }
        if guest.receive {
            socket.end_reading();
        }
        let read = match self.machine.phase() {
            Phase::Greeting => true,
            Phase::Open => {
                self.machine.wants_host_bytes()
                    && !self.readable
                    && self.machine.credit.available() > 0
            }
            Phase::Requesting | Phase::Requested | Phase::Accepting => false,
            Phase::Resetting | Phase::Gone => {
                if socket.is_flushed() {
                    socket.unwatch(self.token, sources)?;
                    self.socket = None;
                    return Ok(());
                }
                false
            }
        };
        let interest = match (read, !socket.is_flushed()) {
            (false, false) => Interest::Nothing,
            (true, false) => Interest::Read,
            (false, true) => Interest::Write,
            (true, true) => Interest::ReadWrite,
        };
        socket.set_interest(self.token, interest, sources)
    }

    /// Whether nothing is left of it on either side.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.machine.phase() == Phase::Gone && self.socket.is_none()
    }
}
