//! The engine: moves packets between the rings, the connections and the host programs.
//!
//! ```text
//!   TX ring --from_guest--> Connection (pure) --> Socket --> host program
//!   RX ring <--to_guest---- turns <-- Table <---- Socket <-- host program
//! ```
//!
//! A process that is killed loses nothing: every step is one transaction of the ledger, and what
//! it does to the world outside comes before or after that so that a successor can tell:
//!
//! - A chain is given back after its effect is written down with the ring's position. One that is
//!   met again at a position that is written down is only given back.
//! - A host program's bytes are peeked at, written down as being in the guest's chain, and then
//!   taken; the socket's peek offset says whether they were (`socket.rs`).
//! - The guest's bytes go from the ledger into a pipe, which is written down, and from there to the
//!   host program; what is left in the pipe says how many did (`conduit.rs`).
//! - A host program's socket is left with the supervisor before it is written down that there is
//!   one, and taken away after it is written down that there is none (`keep.rs`).
//!
//! What is bounded, and what happens at the bound:
//!
//! - Packets for the guest are not queued: a connection knows what it owes and says it when its
//!   turn comes, so a guest without free buffers costs nothing. Host programs are not read
//!   meanwhile.
//! - Resets that belong to no connection are queued, [`RESETS_MAX`] of them; beyond that no
//!   packet of the guest is taken (virtio 1.3, section 5.10.6.1.1, allows it).
//! - Bytes for a host program that does not read: the guest's credit.
//! - Connections and greetings: see `table.rs`.

mod delivery;
mod from_guest;
mod programs;
mod takeover;
mod to_guest;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use backend_daemon::device::{DeviceError, Rings, Sources};
use backend_daemon::ring::Segment;

pub use self::takeover::TakeOverError;
use crate::conduit::Conduit;
use crate::connection::Event;
use crate::death;
use crate::fault::Faults;
use crate::heritage::Heritage;
use crate::host::Host;
use crate::keep::{Keep, Origin};
pub use crate::ledger::RESETS_MAX;
use crate::ledger::{Ledger, RECORD_WORDS, Word};
use crate::packet::Cid;
use crate::socket::Socket;
use crate::table::{Place, Table};

/// The most packets of one direction in one call of the worker.
const BUDGET: usize = 512;
/// A packet's payload fits.
const SCRATCH_BYTES: usize = 64 * 1024;

/// All connections, and where they come from.
#[derive(Debug)]
pub struct Connections {
    guest: Cid,
    host: Host,
    table: Table,
    /// What a successor must know, answers to packets that fit no connection among it.
    ledger: Ledger,
    keep: Keep,
    conduit: Conduit,
    /// A socket that a predecessor made for the guest's request that it had just taken.
    spare: Option<(u64, UnixStream)>,
    /// Whether the listening socket is polled.
    listening: bool,
    faults: Faults,
    /// For bytes that nobody looks at.
    scratch: Vec<u8>,
}

/// Where the rings stand, and what the guest's driver accepted: what tells one of its lives from
/// another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// The RX ring's position.
    pub rx: u16,
    /// The TX ring's position.
    pub tx: u16,
    /// What was negotiated.
    pub features: u64,
}

/// Why a loop over a ring ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// There is nothing left to do, or no buffer to do it with; an event will say when.
    Idle,
    /// It was enough for one call.
    Budget,
    /// There are as many resets as may wait.
    Resets,
}

impl Connections {
    /// Those of a predecessor, if there was one.
    ///
    /// # Errors
    ///
    /// Fails if they can't be taken up.
    pub fn new(guest: Cid, host: Host, heritage: Heritage) -> Result<Self, TakeOverError> {
        let Heritage { ledger, keep, conduit, held, .. } = heritage;
        let mut connections = Self {
            guest,
            host,
            table: Table::new(),
            ledger,
            keep,
            conduit,
            spare: None,
            listening: true,
            faults: Faults::default(),
            scratch: vec![0; SCRATCH_BYTES],
        };
        connections.take_over(held)?;
        Ok(connections)
    }

    /// The socket that host programs connect to.
    #[must_use]
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.host.listener()
    }

    /// Moves packets until nothing moves any more. Says whether it stopped before that, so that
    /// others have their turn.
    ///
    /// # Errors
    ///
    /// Fails if the guest broke a ring, or the host can't poll.
    pub fn pump(&mut self, rings: &mut Rings<'_>) -> Result<bool, DeviceError> {
        loop {
            let taken = self.take_packets(rings)?;
            let given = self.give_packets(rings)?;
            if taken == Stop::Budget || given == Stop::Budget {
                return Ok(true);
            }
            if taken == Stop::Idle || self.ledger.resets() == RESETS_MAX {
                return Ok(false);
            }
        }
    }

    /// Whether the guest is the one that knows these connections: the rings stand where they are
    /// written down to. One further is possible too: a chain was taken and nothing done with it.
    #[must_use]
    pub fn are_known_to(&self, life: Life) -> bool {
        let stands = |word, at: u16| at.wrapping_sub(self.ledger.position(word)) <= 1;
        stands(Word::RxDone, life.rx)
            && stands(Word::TxDone, life.tx)
            && self.ledger.get(Word::Features) == life.features
    }

    /// The guest that knew these connections is no more: ends them all. Bytes that it sent are
    /// still delivered, and host programs that it has not heard of yet may meet the next one,
    /// which has `news` to hear.
    ///
    /// # Errors
    ///
    /// Fails if the host can't poll.
    pub fn forget_guest(
        &mut self,
        next: Life,
        news: u64,
        sources: &mut dyn Sources,
    ) -> Result<(), DeviceError> {
        self.forget_spare();
        for slot in self.table.slots() {
            if let Some(entry) = self.table.get(slot) {
                entry.machine.apply(Event::GuestGone);
            }
            self.settle(slot, sources)?;
        }
        self.ledger.forget_resets();
        self.ledger.set(Word::RxDone, next.rx);
        self.ledger.set(Word::TxDone, next.tx);
        self.ledger.set(Word::Features, next.features);
        self.ledger.set(Word::News, news);
        self.ledger.commit();
        Ok(())
    }

    /// What the guest has to hear: a word of the device's own.
    #[must_use]
    pub fn news(&self) -> u64 {
        self.ledger.get(Word::News)
    }

    /// Writes down what the guest has to hear.
    pub fn set_news(&mut self, news: u64) {
        self.ledger.set(Word::News, news);
        self.ledger.commit();
    }

    /// Has a socket kept for the next connection.
    fn admit(&mut self, from: Origin, stream: UnixStream) -> io::Result<(Place, Socket)> {
        let place = self.table.next_place().ok_or(io::ErrorKind::QuotaExceeded)?;
        let socket = Socket::new(stream)?;
        self.keep.put(place.key(from), socket.as_fd())?;
        Ok((place, socket))
    }

    fn forget_spare(&mut self) {
        if let Some((key, _stream)) = self.spare.take() {
            self.keep.remove(key);
        }
    }

    /// Stages a connection as it is now.
    fn save(&mut self, slot: usize) {
        let record = self.table.get(slot).map_or([0; RECORD_WORDS], |entry| entry.record());
        self.ledger.set_record(slot, &record);
        let (generation, next_host_port) = self.table.counts();
        self.ledger.set(Word::Generation, generation);
        self.ledger.set(Word::NextHostPort, next_host_port);
    }

    /// Does what follows from a connection's state, and writes that down.
    fn settle(&mut self, slot: usize, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        let closed = self.table.settle(slot, sources).map_err(cannot_poll)?;
        self.save(slot);
        self.ledger.commit();
        if let Some((key, socket)) = closed {
            socket.close();
            death::reach();
            self.keep.remove(key.encode());
            self.ledger.forget_area(slot);
        }
        Ok(())
    }
}

fn cannot_poll(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "cannot poll a host program's socket", source }
}

/// The first `len` bytes of `segments`.
fn limit(segments: impl Iterator<Item = Segment>, len: usize) -> Vec<Segment> {
    let mut left = len;
    let cut = segments.map_while(|segment| {
        let head = segment.head(left);
        left -= head.len();
        (!head.is_empty()).then_some(head)
    });
    cut.collect()
}

#[cfg(test)]
mod tests;
