//! All connections of the device: found by their ports, numbered by their slots, taking turns.
//!
//! Nothing here grows beyond [`CONNECTIONS_MAX`], whatever the guest or host programs do.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use backend_daemon::device::{Sources, Token};

use crate::connection::{Connection, Event, Phase};
use crate::entry::Entry;
use crate::keep::{Key, Origin};
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

/// A slot, for one connection: no other ever has the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where.
    pub slot: usize,
    /// Which of all connections, counted from 1.
    pub generation: u64,
}

impl Place {
    /// A token that no earlier connection of the slot had, within 2^21 connections: an event that
    /// is still on its way when a slot changes hands must not reach the next one.
    #[must_use]
    pub fn token(self) -> Token {
        let slot = u32::try_from(self.slot).unwrap_or(SLOT_MASK) & SLOT_MASK;
        let generation = u32::try_from(self.generation & u64::from(u32::MAX)).unwrap_or(0);
        let generation = generation.wrapping_mul(FIRST_TOKEN);
        Token(if generation == 0 { FIRST_TOKEN | slot } else { generation | slot })
    }

    /// What the connection's socket is called in the store.
    #[must_use]
    pub fn key(self, from: Origin) -> Key {
        Key::Connection { slot: self.slot, generation: self.generation, from }
    }
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
    generation: u64,
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

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Where the next connection goes; nothing if the table is full.
    #[must_use]
    pub fn next_place(&self) -> Option<Place> {
        let slot = self.free.last().copied().unwrap_or(self.slots.len());
        (slot < CONNECTIONS_MAX).then_some(Place { slot, generation: self.generation + 1 })
    }

    /// Adds a connection at the [next place](Self::next_place), whose token its socket has.
    /// Gives its slot.
    pub fn insert(
        &mut self,
        place: Place,
        machine: Connection,
        ports: Option<Ports>,
        socket: Socket,
    ) -> usize {
        debug_assert_eq!(self.next_place(), Some(place), "places are taken in their order");
        if self.free.pop().is_none() {
            self.slots.push(None);
        }
        self.generation = place.generation;
        self.put(Entry::new(machine, ports, place, socket))
    }

    /// Takes up a predecessor's connections, and how far it had counted.
    pub fn restore(&mut self, mut entries: Vec<Entry>, generation: u64, next_host_port: u32) {
        let len = entries.iter().map(|entry| entry.place().slot + 1).max().unwrap_or(0);
        self.slots.resize_with(len, || None);
        // The oldest greetings first, as they were.
        entries.sort_by_key(|entry| entry.place().generation);
        for entry in entries {
            self.put(entry);
        }
        self.free = (0..len).rev().filter(|slot| self.slots[*slot].is_none()).collect();
        self.generation = generation;
        if (HOST_PORTS.0..HOST_PORTS.1).contains(&next_host_port) {
            self.next_host_port = next_host_port;
        }
    }

    /// How far it has counted: the last connection's generation, and the next host port.
    #[must_use]
    pub fn counts(&self) -> (u64, u32) {
        (self.generation, self.next_host_port)
    }

    fn put(&mut self, entry: Entry) -> usize {
        let slot = entry.place().slot;
        if entry.machine.phase() == Phase::Greeting {
            self.greetings.push_back(slot);
        }
        if let Some(ports) = entry.ports {
            self.by_ports.insert(ports, slot);
        }
        self.slots[slot] = Some(entry);
        slot
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
        self.slots.get(slot)?.as_ref().filter(|entry| entry.token() == token).map(|_entry| slot)
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

    /// Does what follows from a connection's state: its host end, its turn, its end. Gives the
    /// socket that is to be closed, with its key, once the new state is written down.
    ///
    /// # Errors
    ///
    /// What `epoll_ctl` gives.
    pub fn settle(
        &mut self,
        slot: usize,
        sources: &mut dyn Sources,
    ) -> io::Result<Option<(Key, Socket)>> {
        let Some(entry) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            return Ok(None);
        };
        let closed = entry.settle(sources)?.map(|socket| (entry.key(), socket));
        let phase = entry.machine.phase();
        if entry.machine.next(entry.readable).is_some() && !entry.set_queued(true) {
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
        Ok(closed)
    }

    /// Takes the connection whose turn it is. It has to be settled after its turn.
    pub fn take_turn(&mut self) -> Option<usize> {
        let slot = self.turns.pop_front()?;
        if let Some(entry) = self.get(slot) {
            entry.set_queued(false);
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

#[cfg(test)]
pub(crate) mod tests;
