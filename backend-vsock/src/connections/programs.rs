//! Host programs: those that connect, those that have something to say, those that hang up.

use std::io;
use std::os::unix::net::UnixStream;

use backend_daemon::device::{DeviceError, Interest, Sources, Token};

use super::{Connections, cannot_poll};
use crate::connection::{Connection, Event, Phase};
use crate::death;
use crate::handshake::{LINE_BYTES, Progress};
use crate::keep::Origin;
use crate::ledger::{Part, Word};

impl Connections {
    /// Takes the host programs that wait to be connected, as long as there is room.
    ///
    /// # Errors
    ///
    /// Fails if the host can't poll.
    pub fn accept(
        &mut self,
        listener: Token,
        sources: &mut dyn Sources,
    ) -> Result<(), DeviceError> {
        while !self.table.is_full() {
            let stream = match self.host.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                // No connection's end will bring back what is missing.
                Err(source) if self.table.is_empty() => {
                    return Err(DeviceError::Host { what: "cannot take host programs", source });
                }
                Err(error) => {
                    log::warn!("cannot take a host program: {error}");
                    break;
                }
            };
            if let Err(error) = self.welcome(stream, sources) {
                log::warn!("a host program can't be served: {error}");
                continue;
            }
            if let Some(slowest) = self.table.slowest_greeting() {
                log::debug!("a host program did not name its port for too long");
                self.hung_up(slowest, sources)?;
            }
        }
        // Out of room, or of something else that a connection's end may bring back.
        self.listening = false;
        sources.modify(self.host.listener(), listener, Interest::Nothing).map_err(cannot_poll)
    }

    fn welcome(&mut self, stream: UnixStream, sources: &mut dyn Sources) -> io::Result<()> {
        let (place, mut socket) = self.admit(Origin::Program, stream)?;
        if let Err(error) = socket.watch(place.token(), Interest::Read, sources) {
            self.keep.remove(place.key(Origin::Program).encode());
            return Err(error);
        }
        let slot = self.table.insert(place, Connection::greeting(), None, socket);
        self.save(slot);
        self.ledger.commit();
        Ok(())
    }

    /// Listens again if there is room again.
    ///
    /// # Errors
    ///
    /// Fails if the host can't poll.
    pub fn resume_listener(
        &mut self,
        listener: Token,
        sources: &mut dyn Sources,
    ) -> Result<(), DeviceError> {
        if self.listening || !self.table.take_freed() {
            return Ok(());
        }
        self.listening = true;
        sources.modify(self.host.listener(), listener, Interest::Read).map_err(cannot_poll)
    }

    /// A host program's socket is ready for what it is polled for.
    ///
    /// # Errors
    ///
    /// Fails if the host can't poll.
    pub fn ready(&mut self, token: Token, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        let Some(slot) = self.table.find_token(token) else { return Ok(()) };
        let Some(entry) = self.table.get(slot) else { return Ok(()) };
        let Some(socket) = &entry.socket else { return Ok(()) };
        let Some(watched) = socket.watched() else { return Ok(()) };
        match watched {
            // Nothing is asked for: only a hang-up comes unasked. Or the event is older than the wish
            // not to hear of it.
            Interest::Nothing if socket.has_hung_up() => return self.hung_up(slot, sources),
            Interest::Nothing => {}
            Interest::Read if entry.machine.phase() == Phase::Greeting => {
                self.read_line(slot)?;
            }
            Interest::Read => entry.readable = true,
            Interest::Write => self.flush(slot)?,
            Interest::ReadWrite => {
                entry.readable = true;
                self.flush(slot)?;
            }
        }
        self.settle(slot, sources)
    }

    fn hung_up(&mut self, slot: usize, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        if let Some(entry) = self.table.get(slot) {
            let token = entry.token();
            if let Some(socket) = &mut entry.socket {
                socket.unwatch(token, sources).map_err(cannot_poll)?;
            }
            entry.machine.apply(Event::HostGone);
            entry.deafen();
            // What it sent before is still in its socket.
            entry.readable = true;
        }
        self.settle(slot, sources)
    }

    /// Reads on in the program's first line, and not a byte beyond it.
    pub(super) fn read_line(&mut self, slot: usize) -> Result<(), DeviceError> {
        let mut bytes = [0; LINE_BYTES];
        loop {
            let Some(entry) = self.table.get(slot) else { return Ok(()) };
            let Some(socket) = &entry.socket else { return Ok(()) };
            let len = match socket.peek_line(&mut bytes) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    log::debug!("a host program left before its first line: {error}");
                    entry.machine.apply(Event::HostGone);
                    return Ok(());
                }
            };
            let progress = entry.line.take(&bytes[..len]);
            let ours = match progress {
                Progress::More => len,
                Progress::Port { consumed, .. } => consumed,
                Progress::Malformed => {
                    log::debug!("a host program did not say CONNECT and a port");
                    entry.machine.apply(Event::HostGone);
                    return Ok(());
                }
            };
            socket.will_consume(ours).map_err(cannot_read)?;
            if let Progress::Port { port, .. } = progress {
                self.table.name(slot, port);
            }
            self.save(slot);
            // A line is short.
            self.take_peeked(slot, u32::try_from(ours).unwrap_or(0));
            if progress != Progress::More {
                return Ok(());
            }
        }
    }

    /// Commits what is staged together with the taking of bytes that were peeked at, and takes
    /// them.
    pub(super) fn take_peeked(&mut self, slot: usize, len_bytes: u32) {
        self.ledger.set_part(Word::Taking, Some(Part { slot, len_bytes }));
        self.ledger.commit();
        if let Some(entry) = self.table.get(slot)
            && let Some(socket) = &entry.socket
            && let Err(error) = socket.consume(len_bytes, &mut self.scratch)
        {
            log::warn!("a host program's bytes were taken by somebody else: {error}");
            entry.machine.apply(Event::Nonsense);
        }
        death::reach();
        self.ledger.set_part(Word::Taking, None);
        self.ledger.commit();
    }
}

fn cannot_read(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "cannot read a host program's line", source }
}
