//! The guest's bytes on their way to host programs: into the ledger, from there to the sockets.

use std::io;
use std::os::fd::AsFd;

use backend_daemon::device::DeviceError;
use backend_daemon::ring::{self, Chain};
use vm_memory::VolatileSlice;

use super::{Connections, limit};
use crate::conduit::CONDUIT_BYTES;
use crate::death;
use crate::handshake;
use crate::ledger::{Part, Word};
use crate::packet::HEADER_BYTES;
use crate::sys;

impl Connections {
    /// Copies payload into the connection's area. The credit allowed this much.
    pub(super) fn deliver(&mut self, slot: usize, chain: &Chain, len_bytes: u32) {
        let Some(entry) = self.table.get(slot) else { return };
        let Some(pieces) = entry.outbox.room(len_bytes) else { return };
        let mut pieces = pieces.into_iter();
        let mut room = pieces.next().map(|piece| self.ledger.area(slot, &piece));
        let payload = ring::skip(chain.readable(), HEADER_BYTES as u64);
        for segment in limit(payload, len_bytes as usize) {
            let mut left = Some(segment);
            while let (Some(from), Some(to)) = (left, &room) {
                let copied = sys::copy(from, to);
                left = from.tail(copied);
                room = match to.offset(copied) {
                    Ok(rest) if !rest.is_empty() => Some(rest),
                    Ok(_) | Err(_) => pieces.next().map(|piece| self.ledger.area(slot, &piece)),
                };
            }
        }
        entry.outbox.push(len_bytes);
    }

    /// Tells a host program that it is connected, before all bytes of the guest.
    pub(super) fn greet(&mut self, slot: usize) {
        let Some(entry) = self.table.get(slot) else { return };
        let Some(ports) = entry.ports else { return };
        let answer = handshake::answer(ports.host);
        let Ok(len_bytes) = u32::try_from(answer.len()) else { return };
        let Some(pieces) = entry.outbox.room(len_bytes) else { return };
        let mut bytes = answer.as_bytes();
        for piece in pieces {
            let (now, later) = bytes.split_at(piece.len());
            self.ledger.area(slot, &piece).copy_from(now);
            bytes = later;
        }
        entry.outbox.greet(len_bytes);
    }

    /// Gives a host program what it takes of the bytes that wait for it. What it took is written
    /// down at the end; nothing may be staged before.
    ///
    /// # Errors
    ///
    /// Fails if the pipe does.
    pub(super) fn flush(&mut self, slot: usize) -> Result<(), DeviceError> {
        while self.flush_some(slot).map_err(cannot_deliver)? {}
        Ok(())
    }

    /// Says whether there is more, and room for it.
    fn flush_some(&mut self, slot: usize) -> io::Result<bool> {
        let Some(entry) = self.table.get(slot) else { return Ok(false) };
        let Some(socket) = &entry.socket else { return Ok(false) };
        if entry.outbox.is_empty() {
            return Ok(false);
        }
        let first = entry.outbox.first(CONDUIT_BYTES);
        let pieces: [VolatileSlice<'_>; 2] = first.map(|piece| self.ledger.area(slot, &piece));
        let filled = self.conduit.fill(&pieces)?;
        death::reach();
        self.ledger.set_part(Word::Sending, Some(Part { slot, len_bytes: filled }));
        self.ledger.commit();
        let passed = self.conduit.pass(socket.as_fd(), filled);
        death::reach();
        match &passed {
            Ok(len_bytes) => entry.taken(*len_bytes),
            Err(error) => {
                log::debug!("a host program takes no more: {error}");
                entry.deafen();
            }
        }
        self.save(slot);
        self.ledger.set_part(Word::Sending, None);
        self.ledger.commit();
        let is_empty = passed.is_ok_and(|passed| passed == filled);
        if !is_empty {
            self.conduit.drain()?;
        }
        Ok(is_empty)
    }
}

fn cannot_deliver(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "cannot pass bytes on to a host program", source }
}
