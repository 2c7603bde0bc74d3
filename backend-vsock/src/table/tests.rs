//! Slots, names, turns, and a table that a successor takes up.

use std::collections::HashSet;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use backend_daemon::device::Interest;

use super::*;
use crate::connection::Packet;
use crate::packet::Op;

/// Polls nothing.
pub(crate) struct NoSources;

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
    let place = table.next_place().unwrap();
    let mut socket = Socket::new(ours).unwrap();
    socket.watch(place.token(), Interest::Read, &mut NoSources).unwrap();
    (table.insert(place, Connection::greeting(), None, socket), theirs)
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
    entry.machine.credit.receive(9).unwrap();
    entry.outbox.push(9);
    entry.machine.apply(Event::Sent(Packet::Request));
    entry.machine.apply(Event::Packet { op: Op::Reset, flags: 0, len_bytes: 0 });
    table.settle(slot, &mut NoSources).unwrap();
    assert_eq!(table.find(ports), None);
    let entry = table.get(slot).unwrap();
    assert!(entry.socket.is_some());
    entry.taken(9);
    assert!(table.settle(slot, &mut NoSources).unwrap().is_some());
    assert!(table.get(slot).is_none());
}

#[test]
fn a_successor_takes_the_table_up_as_it_was() {
    let mut table = Table::new();
    let mut programs: Vec<UnixStream> = Vec::new();
    for port in 0..6 {
        let (slot, program) = greet(&mut table);
        programs.push(program);
        if port % 2 == 0 {
            table.name(slot, port);
            table.settle(slot, &mut NoSources).unwrap();
        }
    }
    end(&mut table, 1);
    let (_slot, last) = greet(&mut table);
    programs.push(last);
    end(&mut table, 3);
    let (generation, next_host_port) = table.counts();
    let mut successor = Table::new();
    let entries = table.slots().into_iter().map(|slot| {
        let record = table.get(slot).unwrap().record();
        let (entry, had_socket) = Entry::restore(slot, &record).unwrap();
        assert!(had_socket);
        assert_eq!(entry.place(), table.get(slot).unwrap().place());
        entry
    });
    let entries = entries.collect();
    successor.restore(entries, generation, next_host_port);
    assert_eq!(successor.slots(), table.slots());
    assert_eq!(successor.by_ports, table.by_ports);
    assert_eq!(successor.greetings, table.greetings);
    assert_eq!(successor.next_place(), table.next_place());
    assert_eq!(successor.next_place().unwrap().slot, 3);
    assert_eq!(successor.counts(), table.counts());
}
