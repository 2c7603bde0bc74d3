//! All connections of the device: found by their ports, numbered by their slots, taking turns.
//!
//! Nothing here grows beyond [`CONNECTIONS_MAX`], whatever the guest or host programs do.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use backend_daemon::device::{Sources, Token};

use crate::connection::{Connection, Event, Phase};
use crate::entry::Entry;
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
            Ok(socket) => socket,
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
        self.slots[slot] = Some(Entry::new(machine, ports, token, socket));
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
        Ok(())
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

/// A token that no earlier connection of the slot had, within 2^21 connections: an event that is
/// still on its way when a slot changes hands must not reach the next one.
fn token(slot: usize, generation: u32) -> Token {
    let slot = u32::try_from(slot).unwrap_or(SLOT_MASK) & SLOT_MASK;
    let generation = generation.wrapping_mul(FIRST_TOKEN);
    Token(if generation == 0 { FIRST_TOKEN | slot } else { generation | slot })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;

    use backend_daemon::device::Interest;

    use super::*;
    use crate::connection::Packet;
    use crate::packet::Op;

    /// Polls nothing.
    struct NoSources;

    impl Sources for NoSources {
        fn add(&mut self, _: BorrowedFd<'_>, _: Token, _: Interest) -> io::Result<()> {
            Ok(())
        }

        fn modify(&mut self, _: BorrowedFd<'_>, _: Token, _: Interest) -> io::Result<()> {
            Ok(())
        }

        fn remove(&mut self, _: BorrowedFd<'_>, _: Token) -> io::Result<()> {
            Ok(())
        }
    }

    fn greet(table: &mut Table) -> (usize, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let slot = table.insert(Connection::greeting(), None, |token| {
            Socket::watch(ours, token, Interest::Read, &mut NoSources)
        });
        (slot.unwrap().unwrap(), theirs)
    }

    fn end(table: &mut Table, slot: usize) {
        table.get(slot).unwrap().machine.apply(Event::HostGone);
        table.settle(slot, &mut NoSources).unwrap();
    }

    #[test]
    fn a_slot_that_changes_hands_has_another_token() {
        let mut table = Table::new();
        let mut tokens = HashSet::new();
        assert!(table.is_empty());
        for _ in 0..100 {
            let (slot, _program) = greet(&mut table);
            assert_eq!(slot, 0);
            let token = table.get(slot).unwrap().token();
            assert_eq!(table.find_token(token), Some(slot));
            assert!(tokens.insert(token));
            assert!(!table.take_freed() && !table.is_empty());
            end(&mut table, slot);
            assert!(table.take_freed());
            assert!(table.is_empty());
            assert_eq!(table.find_token(token), None);
        }
    }

    #[test]
    fn names_are_never_given_twice_even_when_the_ports_wrap() {
        let mut table = Table::new();
        table.next_host_port = HOST_PORTS.1 - 2;
        let mut names = HashSet::new();
        let mut programs = Vec::new();
        for _ in 0..10 {
            let (slot, program) = greet(&mut table);
            programs.push(program);
            table.name(slot, 80);
            let ports = table.get(slot).unwrap().ports.unwrap();
            assert!((HOST_PORTS.0..HOST_PORTS.1).contains(&ports.host));
            assert_eq!(table.find(ports), Some(slot));
            assert!(names.insert(ports));
            // The next one would get this port again.
            table.next_host_port = ports.host;
        }
    }

    #[test]
    fn whoever_has_had_a_turn_waits_for_all_others() {
        let mut table = Table::new();
        let mut programs = Vec::new();
        for port in 0..3 {
            let (slot, program) = greet(&mut table);
            programs.push(program);
            table.name(slot, port);
            table.settle(slot, &mut NoSources).unwrap();
            table.settle(slot, &mut NoSources).unwrap();
        }
        for expected in [0, 1, 2, 0, 1, 2] {
            let slot = table.take_turn().unwrap();
            assert_eq!(slot, expected);
            // It has not said what it has to say.
            table.settle(slot, &mut NoSources).unwrap();
        }
    }

    #[test]
    fn a_full_table_refuses_and_an_ended_connection_makes_room() {
        let mut table = Table::new();
        // Slots are enough; nobody asks for what is in them.
        table.slots.resize_with(CONNECTIONS_MAX, || None);
        assert!(table.is_full());
        table.free.push(7);
        assert!(!table.is_full());
        let (slot, _program) = greet(&mut table);
        assert_eq!(slot, 7);
        assert!(table.is_full());
        end(&mut table, slot);
        assert!(!table.is_full());
    }

    #[test]
    fn a_connection_that_ends_gives_its_name_back_while_its_bytes_are_still_under_way() {
        let mut table = Table::new();
        let (slot, _program) = greet(&mut table);
        table.name(slot, 1);
        let entry = table.get(slot).unwrap();
        let ports = entry.ports.unwrap();
        entry.socket.as_mut().unwrap().keep(b"under way");
        entry.machine.apply(Event::Sent(Packet::Request));
        entry.machine.apply(Event::Packet { op: Op::Reset, flags: 0, len_bytes: 0 });
        table.settle(slot, &mut NoSources).unwrap();
        assert_eq!(table.find(ports), None);
        let entry = table.get(slot).unwrap();
        assert!(entry.socket.is_some());
        entry.socket.as_mut().unwrap().discard();
        table.settle(slot, &mut NoSources).unwrap();
        assert!(table.get(slot).is_none());
    }
}
