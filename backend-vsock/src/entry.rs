//! One connection whole: its state, its name, its host program, and what is on the way to it.

use std::io;

use backend_daemon::device::{Interest, Sources, Token};

use crate::connection::{Connection, Event, Phase};
use crate::credit::Credit;
use crate::handshake::{LINE_BYTES, Line};
use crate::keep::{Key, Origin};
use crate::ledger::{RECORD_WORDS, Record, high, low, word};
use crate::outbox::Outbox;
use crate::packet::Ports;
use crate::socket::Socket;
use crate::table::Place;

/// Bits of a record beside the machine's.
const NAMED: u32 = 1;
const CONNECTED: u32 = 1 << 1;
const BY_GUEST: u32 = 1 << 2;

/// One connection with its host program's socket.
#[derive(Debug)]
pub struct Entry {
    /// Its state.
    pub machine: Connection,
    /// Its name, once it has one.
    pub ports: Option<Ports>,
    /// The host program's end, until that is closed.
    pub socket: Option<Socket>,
    /// Bytes for the host program.
    pub outbox: Outbox,
    /// The host program's first line, as far as it was read.
    pub line: Line,
    /// The host program may have sent something that is not read yet.
    pub readable: bool,
    place: Place,
    origin: Origin,
    /// Whether it waits for its turn.
    queued: bool,
}

impl Entry {
    /// A new connection.
    #[must_use]
    pub fn new(machine: Connection, ports: Option<Ports>, place: Place, socket: Socket) -> Self {
        let origin = if ports.is_some() { Origin::Guest } else { Origin::Program };
        Self {
            machine,
            ports,
            socket: Some(socket),
            outbox: Outbox::default(),
            line: Line::default(),
            readable: false,
            place,
            origin,
            queued: false,
        }
    }

    /// A connection as it was written down, still without its socket, and whether it had one;
    /// nothing if that makes no sense.
    #[must_use]
    pub fn restore(slot: usize, record: &Record) -> Option<(Self, bool)> {
        let [state, generation, ports, credit @ .., place, lengths, l0, l1, l2, l3] = *record;
        let bits = high(state);
        let machine = Connection::from_bits(low(state), Credit::from_words(credit))?;
        let line: Vec<u8> = [l0, l1, l2, l3].into_iter().flat_map(u64::to_le_bytes).collect();
        let line = Line::restore(line.get(..usize::try_from(low(lengths)).ok()?)?)?;
        let outbox = Outbox::restore(high(place), low(place), high(lengths))?;
        if machine.credit.held() != low(place) - high(lengths) {
            return None;
        }
        let entry = Self {
            machine,
            ports: (bits & NAMED != 0).then(|| Ports { host: high(ports), guest: low(ports) }),
            socket: None,
            outbox,
            line,
            readable: true,
            place: Place { slot, generation },
            origin: if bits & BY_GUEST != 0 { Origin::Guest } else { Origin::Program },
            queued: false,
        };
        Some((entry, bits & CONNECTED != 0))
    }

    /// To be written down.
    #[must_use]
    pub fn record(&self) -> Record {
        let bits = [
            (NAMED, self.ports.is_some()),
            (CONNECTED, self.socket.is_some()),
            (BY_GUEST, self.origin == Origin::Guest),
        ];
        let bits = bits.into_iter().filter(|(_bit, is_so)| *is_so).map(|(bit, _)| bit).sum();
        let ports = self.ports.map_or(0, |ports| word(ports.host, ports.guest));
        let [c0, c1, c2] = self.machine.credit.to_words();
        let (at, len, greeting) = self.outbox.parts();
        let mut line = [0; LINE_BYTES];
        let line_bytes = self.line.bytes();
        line[..line_bytes.len()].copy_from_slice(line_bytes);
        let line_len = u32::try_from(line_bytes.len()).unwrap_or(0);
        let mut record = [0; RECORD_WORDS];
        record[..8].copy_from_slice(&[
            word(bits, self.machine.to_bits()),
            self.place.generation,
            ports,
            c0,
            c1,
            c2,
            word(at, len),
            word(greeting, line_len),
        ]);
        for (to, from) in record[8..].iter_mut().zip(line.as_chunks().0) {
            *to = u64::from_le_bytes(*from);
        }
        record
    }

    /// Where it is.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    /// The name of its event source.
    #[must_use]
    pub fn token(&self) -> Token {
        self.place.token()
    }

    /// What its socket is called in the store.
    #[must_use]
    pub fn key(&self) -> Key {
        self.place.key(self.origin)
    }

    /// Takes note of whether it waits for its turn; gives whether it did.
    pub fn set_queued(&mut self, queued: bool) -> bool {
        std::mem::replace(&mut self.queued, queued)
    }

    /// The host program took so many bytes.
    pub fn taken(&mut self, len: u32) {
        let forwarded = self.outbox.take(len);
        self.machine.credit.forward(forwarded);
    }

    /// The host program takes no more: forget what waits for it.
    pub fn deafen(&mut self) {
        self.machine.apply(Event::HostDeaf);
        let lost = self.outbox.clear();
        self.machine.credit.forward(lost);
    }

    /// Does to the host program's socket what follows from the machine's state. Gives the socket
    /// back if it is done with: to be closed once that is written down.
    ///
    /// # Errors
    ///
    /// What `epoll_ctl` gives.
    pub fn settle(&mut self, sources: &mut dyn Sources) -> io::Result<Option<Socket>> {
        let token = self.token();
        let Some(socket) = &mut self.socket else { return Ok(None) };
        let is_flushed = self.outbox.is_empty();
        if is_flushed {
            self.machine.apply(Event::Flushed);
        }
        let guest = self.machine.guest_shut();
        if guest.send && is_flushed {
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
                if is_flushed {
                    socket.unwatch(token, sources)?;
                    return Ok(self.socket.take());
                }
                false
            }
        };
        let interest = match (read, !is_flushed) {
            (false, false) => Interest::Nothing,
            (true, false) => Interest::Read,
            (false, true) => Interest::Write,
            (true, true) => Interest::ReadWrite,
        };
        socket.set_interest(token, interest, sources)?;
        Ok(None)
    }

    /// Whether nothing is left of it on either side.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.machine.phase() == Phase::Gone && self.socket.is_none()
    }
}
