//! A predecessor's connections: what its last steps came to, and whose sockets are whose.
//!
//! The ledger and the supervisor's store are reconciled: a connection without its socket is reset;
//! a socket of a connection that is over is closed; one of a connection that was never written
//! down becomes one, if a host program waits there, or waits for the guest's request to be taken
//! up again.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use backend_daemon::device::{DeviceError, Interest, Sources};

use super::{Connections, cannot_poll};
use crate::connection::{Connection, Event};
use crate::entry::Entry;
use crate::keep::{Key, Origin};
use crate::ledger::{LedgerError, Part, Word};
use crate::socket::Socket;
use crate::table::CONNECTIONS_MAX;

/// Why a predecessor's connections can't be taken up.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// What was written down can't be read.
    #[error("cannot take up the connections")]
    Ledger(#[from] LedgerError),
    /// The host does not tell what became of bytes.
    #[error("cannot tell what became of a host program's bytes")]
    Host(#[source] io::Error),
}

impl Connections {
    /// Takes up what the ledger and the store hold.
    pub(super) fn take_over(
        &mut self,
        mut held: BTreeMap<u64, OwnedFd>,
    ) -> Result<(), TakeOverError> {
        let newest = self.ledger.get(Word::Generation);
        let mut entries = Vec::new();
        for slot in 0..CONNECTIONS_MAX {
            let record = *self.ledger.record(slot);
            if record[0] == 0 {
                continue;
            }
            let (mut entry, had_socket) = Entry::restore(slot, &record)
                .filter(|(entry, _had_socket)| entry.place().generation <= newest)
                .ok_or(LedgerError::Nonsense("a connection's record"))?;
            if had_socket {
                let kept = held.remove(&entry.key().encode()).map(UnixStream::from);
                let taking = self.ledger.part(Word::Taking).filter(|part| part.slot == slot);
                let taking = taking.map_or(0, |part| part.len_bytes);
                take_socket(&mut entry, kept, taking, &mut self.scratch);
            }
            entries.push(entry);
        }
        let next_host_port = u32::try_from(self.ledger.get(Word::NextHostPort)).unwrap_or(0);
        self.table.restore(entries, newest, next_host_port);
        self.ledger.set_part(Word::Taking, None);
        self.ledger.commit();
        self.finish_sending().map_err(TakeOverError::Host)?;
        for slot in self.table.slots() {
            self.save(slot);
            self.ledger.commit();
        }
        self.sort_out(held);
        Ok(())
    }

    /// A delivery was under way: what is no longer in the pipe is in the socket.
    fn finish_sending(&mut self) -> io::Result<()> {
        if let Some(Part { slot, len_bytes }) = self.ledger.part(Word::Sending) {
            let left = self.conduit.left()?;
            if let Some(entry) = self.table.get(slot) {
                if let Some(left) = left {
                    entry.taken(len_bytes.saturating_sub(left).min(entry.outbox.len()));
                } else {
                    log::warn!("the pipe was lost, and nobody knows what it had in it");
                    entry.machine.apply(Event::Nonsense);
                    entry.deafen();
                }
                self.save(slot);
            }
            self.ledger.set_part(Word::Sending, None);
            self.ledger.commit();
        }
        self.conduit.drain()
    }

    /// Sockets that no connection claims.
    fn sort_out(&mut self, held: BTreeMap<u64, OwnedFd>) {
        let newest = self.ledger.get(Word::Generation);
        for (key, fd) in held {
            match Key::decode(key) {
                Some(Key::Connection { generation, from, .. }) if generation > newest => {
                    let stream = UnixStream::from(fd);
                    match from {
                        Origin::Program => self.greet_again(key, stream),
                        Origin::Guest => self.spare = Some((key, stream)),
                    }
                }
                _ => {
                    let closed = Socket::new(UnixStream::from(fd)).map(Socket::close);
                    if let Err(error) = closed {
                        log::debug!("a descriptor that nobody knows was left: {error}");
                    }
                    self.keep.remove(key);
                }
            }
        }
    }

    /// A host program was accepted by the predecessor, and nothing else yet.
    fn greet_again(&mut self, key: u64, stream: UnixStream) {
        match self.admit(Origin::Program, stream) {
            Ok((place, socket)) => {
                let slot = self.table.insert(place, Connection::greeting(), None, socket);
                self.save(slot);
                self.ledger.commit();
                if place.key(Origin::Program).encode() != key {
                    self.keep.remove(key);
                }
            }
            Err(error) => {
                log::warn!("a host program that waits can't be taken over: {error}");
                self.keep.remove(key);
            }
        }
    }

    /// Has all sockets polled that a predecessor left.
    ///
    /// # Errors
    ///
    /// Fails if the host can't poll.
    pub fn watch_all(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        for slot in self.table.slots() {
            if let Some(entry) = self.table.get(slot) {
                let token = entry.token();
                if let Some(socket) = &mut entry.socket {
                    socket.watch(token, Interest::Nothing, sources).map_err(cannot_poll)?;
                }
            }
            self.flush(slot)?;
            self.settle(slot, sources)?;
        }
        Ok(())
    }
}

/// Gives a connection its socket back, and finishes what was being taken from it. One whose socket
/// is lost can't go on.
fn take_socket(entry: &mut Entry, kept: Option<UnixStream>, taking: u32, scratch: &mut [u8]) {
    let kept = kept.ok_or_else(|| io::ErrorKind::NotFound.into());
    match kept.and_then(|stream| Socket::resume(stream, taking, scratch)) {
        Ok(socket) => entry.socket = Some(socket),
        Err(error) => {
            log::warn!("a host program's socket was lost: {error}");
            entry.machine.apply(Event::HostGone);
            entry.machine.apply(Event::Nonsense);
            entry.deafen();
        }
    }
}
