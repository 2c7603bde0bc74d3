//! All connections of the device: found by their ports, numbered by their slots, taking turns.
//!
//! Nothing here grows beyond [`CONNECTIONS_MAX`], whatever the guest or host programs do.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use backend_daemon::device::{Interest, Sources, Token};

use crate::connection::{Connection, Event, Phase};
use crate::packet::Ports;
use crate::socket::Socket;

/// The most connections at a time.
pub const CONNECTIONS_MAX: usize = 1024;
/// The most host programs at a time that have not named their port. Beyond that, the one that
/// has been waiting longest has to go.
pub const GREETINGS_MAX: usize = 64;
/// How many descriptors a process with a full table has open, with room for the daemon's own.
pub const DESCRIPTORS_MAX: u64 = CONNECTIONS_MAX as u64 + 256;
/// Tokens below this are the device's own.
const FIRST_TOKEN: u32 = 1 << 11;
const SLOT_MASK: u32 = FIRST_TOKEN - 1;
/// Host ports for host programs: out of the way of those that guests connect to.
const HOST_PORTS: (u32, u32) = (1 << 30, 1 << 31);

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

/// The connections.
#[derive(Debug)]
pub struct Table {
    slots: Vec<Option<Entry>>,
    free: Vec<usize>,
    by_ports: BTreeMap<Ports, usize>,
    /// Slots that have a packet for the guest, each at most once: whoever had its turn and has
    /// more goes to the end.
    turns: VecDeque<usize>,
    /// Slots in [`Phase::Greeting`], the oldest first.
    greetings: VecDeque<usize>,
    next_host_port: u32,
    /// A slot became free since somebody asked.
    freed: bool,
    generation: u32,
}

impl Entry {
    /// The name of its event source.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
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
    fn settle(&mut self, sources: &mut dyn Sources) -> io::Result<()> {
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

    fn is_over(&self) -> bool {
        self.machine.phase() == Phase::Gone && self.socket.is_none()
    }
}

impl Table {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: BTreeMap::new(),
            turns: VecDeque::new(),
            greetings: VecDeque::new(),
            next_host_port: HOST_PORTS.0,
            freed: false,
            generation: 0,
        }
    }

    /// Whether there is no room for one more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() == CONNECTIONS_MAX
    }

    /// Adds a connection; `socket` makes its host end, given its token. `None` if the table is
    /// full.
    ///
    /// # Errors
    ///
    /// What `socket` gives.
    pub fn insert(
        &mut self,
        machine: Connection,
        ports: Option<Ports>,
        socket: impl FnOnce(Token) -> io::Result<Socket>,
    ) -> io::Result<Option<usize>> {
        if self.is_full() {
            return Ok(None);
        }
        let slot = self.free.pop().unwrap_or(self.slots.len());
        self.generation = self.generation.wrapping_add(1);
        let token = token(slot, self.generation);
        let socket = match socket(token) {
            Ok(socket) => Some(socket),
            Err(error) => {
                if slot < self.slots.len() {
                    self.free.push(slot);
                }
                return Err(error);
            }
        };
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        if machine.phase() == Phase::Greeting {
            self.greetings.push_back(slot);
        }
        if let Some(ports) = ports {
            self.by_ports.insert(ports, slot);
        }
        let entry = Entry { machine, ports, socket, readable: false, token, queued: false };
        self.slots[slot] = Some(entry);
        Ok(Some(slot))
    }

    /// The connection in a slot.
    pub fn get(&mut self, slot: usize) -> Option<&mut Entry> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// The slot of the connection with these ports, as far as the guest may know of it.
    #[must_use]
    pub fn find(&self, ports: Ports) -> Option<usize> {
        self.by_ports.get(&ports).copied()
    }

    /// The slot of the connection that this event source belongs to.
    #[must_use]
    pub fn find_token(&self, token: Token) -> Option<usize> {
        let slot = usize::try_from(token.0 & SLOT_MASK).ok()?;
        self.slots.get(slot)?.as_ref().filter(|entry| entry.token == token).map(|_entry| slot)
    }

    /// All slots that are in use.
    #[must_use]
    pub fn slots(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|slot| self.slots[*slot].is_some()).collect()
    }

    /// The host program in `slot` named its `guest` port: gives the connection its name.
    pub fn name(&mut self, slot: usize, guest: u32) {
        let ports = loop {
            let host = self.next_host_port;
            self.next_host_port = if host + 1 == HOST_PORTS.1 { HOST_PORTS.0 } else { host + 1 };
            // There are far more ports than connections: this ends.
            let ports = Ports { host, guest };
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        if let Some(entry) = self.get(slot) {
            entry.ports = Some(ports);
            entry.machine.apply(Event::Named);
            self.by_ports.insert(ports, slot);
        }
    }

    /// The host program that has to go for its silence, if there are too many of them.
    #[must_use]
    pub fn slowest_greeting(&self) -> Option<usize> {
        (self.greetings.len() > GREETINGS_MAX).then(|| self.greetings[0])
    }

    /// Does what follows from a connection's state: its host end, its turn, its end.
    ///
    /// # Errors
    ///
    /// What `epoll_ctl` gives.
    pub fn settle(&mut self, slot: usize, sources: &mut dyn Sources) -> io::Result<()> {
        let Some(entry) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            return Ok(());
        };
        entry.settle(sources)?;
        let phase = entry.machine.phase();
        if !entry.queued && entry.machine.next(entry.readable).is_some() {
            entry.queued = true;
            self.turns.push_back(slot);
        }
        let unnamed = if phase == Phase::Gone { entry.ports.take() } else { None };
        let over = entry.is_over();
        if let Some(ports) = unnamed {
            self.by_ports.remove(&ports);
        }
        if phase != Phase::Greeting {
            self.greetings.retain(|greeting| *greeting != slot);
        }
        if over {
            self.turns.retain(|turn| *turn != slot);
            self.slots[slot] = None;
            self.free.push(slot);
            self.freed = true;
        }
        Ok(())
    }

    /// Takes the connection whose turn it is. It has to be settled after its turn.
    pub fn take_turn(&mut self) -> Option<usize> {
        let slot = self.turns.pop_front()?;
        if let Some(entry) = self.get(slot) {
            entry.queued = false;
        }
        Some(slot)
    }

    /// Whether a slot became free since this was last asked.
    pub fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.freed)
    }

    /// Whether anybody waits for a turn.
    #[must_use]
    pub fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

/// A token that no earlier connection of the slot had, within 2^21 connections: an event that is
/// still on its way when a slot changes hands must not reach the next one.
fn token(slot: usize, generation: u32) -> Token {
    let slot = u32::try_from(slot).unwrap_or(SLOT_MASK) & SLOT_MASK;
    let generation = generation.wrapping_mul(FIRST_TOKEN);
    Token(if generation == 0 { FIRST_TOKEN | slot } else { generation | slot })
}
