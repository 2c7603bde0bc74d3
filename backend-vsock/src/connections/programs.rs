//! Host programs: those that connect, those that have something to say, those that hang up.

use std::io;

use backend_daemon::device::{DeviceError, Interest, Sources, Token};

use super::{Connections, cannot_poll};
use crate::connection::{Connection, Event, Phase};
use crate::entry::Entry;
use crate::handshake::Progress;
use crate::socket::Socket;

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
            let inserted = self.table.insert(Connection::greeting(), None, |token| {
                Socket::watch(stream, token, Interest::Read, sources)
            });
            if let Err(error) = inserted {
                log::warn!("cannot poll a host program: {error}");
                break;
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
        let Some(watched) = entry.socket.as_ref().and_then(Socket::watched) else { return Ok(()) };
        match watched {
            // Nothing was asked for: only a hang-up comes unasked.
            Interest::Nothing => return self.hung_up(slot, sources),
            Interest::Read if entry.machine.phase() == Phase::Greeting => {
                if let Some(port) = read_line(entry) {
                    self.table.name(slot, port);
                }
            }
            Interest::Read => entry.readable = true,
            Interest::Write => entry.flush(),
            Interest::ReadWrite => {
                entry.readable = true;
                entry.flush();
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
}

/// Reads on in the program's first line; gives the port once it is whole.
fn read_line(entry: &mut Entry) -> Option<u32> {
    let progress = entry.socket.as_mut()?.read_line();
    match progress {
        Ok(Progress::More) => return None,
        Ok(Progress::Port { port, .. }) => return Some(port),
        Ok(Progress::Malformed) => log::debug!("a host program did not say CONNECT and a port"),
        Err(error) => log::debug!("a host program left before its first line: {error}"),
    }
    entry.machine.apply(Event::HostGone);
    None
}
