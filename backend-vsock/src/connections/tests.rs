//! A predecessor's last steps, and memory in which anything may stand.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use backend_daemon::process::State;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::connection::{Connection, Phase};
use crate::ledger::tests::{fresh, scribble};
use crate::ledger::{AREA_BYTES, Part};
use crate::packet::{Header, Op, Ports, TYPE_STREAM};
use crate::table::tests::NoSources;

const CID: Cid = Cid(52);

/// What outlives each of a device's lives.
struct World {
    state: State,
    pipe: Conduit,
    folder: TempDir,
    listener: UnixListener,
    held: BTreeMap<u64, OwnedFd>,
    is_pipe_lost: bool,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("v")).unwrap();
        let (pipe, held) = (Conduit::make().unwrap(), BTreeMap::new());
        Self { state: fresh(), pipe, folder, listener, held, is_pipe_lost: false }
    }

    /// The next life.
    fn live(&self) -> Result<Connections, TakeOverError> {
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let (read, write) = self.pipe.ends();
        let heritage = Heritage {
            ledger: Ledger::open(self.state.clone(), CID)?,
            keep: Keep::new(None),
            conduit: if self.is_pipe_lost {
                Conduit::make().unwrap()
            } else {
                Conduit::adopt(copy(read), copy(write))
            },
            held: self.held.iter().map(|(key, fd)| (*key, copy(fd.as_fd()))).collect(),
            listener: None,
        };
        let listener = Some(copy(self.listener.as_fd()));
        let opened = Host::open(&self.folder.path().join("v"), listener).unwrap();
        Connections::new(CID, opened.host, heritage)
    }

    /// Adds a connection and has its socket kept; gives its slot and the program's end.
    fn add(&mut self, machine: Connection, ports: Option<Ports>) -> (usize, UnixStream) {
        let mut connections = self.live().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        for stream in [&ours, &theirs] {
            stream.set_nonblocking(true).unwrap();
        }
        let from = if ports.is_some() { Origin::Guest } else { Origin::Program };
        let kept = ours.try_clone().unwrap();
        let (place, socket) = connections.admit(from, ours).unwrap();
        let slot = connections.table.insert(place, machine, ports, socket);
        connections.save(slot);
        connections.ledger.commit();
        self.held.insert(place.key(from).encode(), kept.into());
        (slot, theirs)
    }
}

/// A connection that the guest opened.
fn open() -> Connection {
    let header = Header {
        src_cid: CID,
        dst_cid: Cid(2),
        src_port: 1,
        dst_port: 2,
        len_bytes: 0,
        kind: TYPE_STREAM,
        op: Op::Request.number(),
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    let mut connection = Connection::accepting(&header);
    connection.apply(Event::Sent(crate::connection::Packet::Response));
    connection
}

fn byte(at: usize) -> u8 {
    u8::try_from(at % 251).unwrap()
}

/// Puts what comes next at `at` into the outbox, as far as there is credit.
fn push(connections: &mut Connections, slot: usize, at: &mut usize, most: u32) {
    let entry = connections.table.get(slot).unwrap();
    if entry.machine.credit.receive(most).is_err() {
        return;
    }
    let mut next = *at;
    for piece in entry.outbox.room(most).unwrap() {
        let bytes: Vec<u8> = (next..next + piece.len()).map(byte).collect();
        connections.ledger.area(slot, &piece).copy_from(&bytes);
        next += piece.len();
    }
    entry.outbox.push(most);
    connections.save(slot);
    connections.ledger.commit();
    *at = next;
}

#[test]
fn bytes_reach_a_program_once_wherever_the_process_dies() {
    let mut world = World::new();
    let (slot, mut program) = world.add(open(), Some(Ports { host: 2, guest: 1 }));
    let (mut put, mut got) = (0, 0);
    let mut read = |program: &mut UnixStream, most: usize| {
        let mut bytes = vec![0; most];
        if let Ok(len) = program.read(&mut bytes) {
            for (at, there) in (got..).zip(&bytes[..len]) {
                assert_eq!(*there, byte(at), "at {at}");
            }
            got += len;
        }
        got
    };
    for death in 0..400 {
        let mut connections = world.live().unwrap();
        push(&mut connections, slot, &mut put, 7000 + 13 * death);
        // Once nothing but the dying process touches the program, and once after it took more.
        death::after(usize::try_from(death % 12).unwrap(), || connections.flush(slot).unwrap());
        read(&mut program, usize::try_from(death).unwrap() * 31);
        // A successor that dies while it takes over.
        death::after(usize::try_from(death % 7).unwrap(), || world.live().unwrap());
    }
    for _rest in 0..1000 {
        let mut connections = world.live().unwrap();
        connections.flush(slot).unwrap();
        if read(&mut program, AREA_BYTES) == put {
            let mut connections = world.live().unwrap();
            assert!(connections.table.get(slot).unwrap().outbox.is_empty());
            return;
        }
    }
    panic!("bytes are missing");
}

#[test]
fn a_connection_is_reset_if_the_pipe_is_lost_that_had_its_bytes() {
    let mut world = World::new();
    let (slot, _program) = world.add(open(), Some(Ports { host: 2, guest: 1 }));
    let (other, _other_program) = world.add(open(), Some(Ports { host: 2, guest: 3 }));
    let mut connections = world.live().unwrap();
    push(&mut connections, slot, &mut 0, 100);
    connections.ledger.set_part(Word::Sending, Some(Part { slot, len_bytes: 100 }));
    connections.ledger.commit();
    world.is_pipe_lost = true;
    let mut connections = world.live().unwrap();
    assert_eq!(connections.table.get(slot).unwrap().machine.phase(), Phase::Resetting);
    assert_eq!(connections.table.get(other).unwrap().machine.phase(), Phase::Open);
    assert_eq!(connections.ledger.part(Word::Sending), None);
}

#[test]
fn a_line_is_read_once_wherever_the_process_dies_and_what_follows_is_left() {
    for first in [5, 9, 14] {
        for death in 0..200 {
            let mut world = World::new();
            let (slot, mut program) = world.add(Connection::greeting(), None);
            let text = b"CONNECT 1024\nhello";
            program.write_all(&text[..first]).unwrap();
            let turn = |world: &World, places| {
                let mut connections = world.live().unwrap();
                let greeting = connections.table.get(slot).unwrap().machine.phase();
                if greeting == Phase::Greeting {
                    death::after(places, || connections.read_line(slot).unwrap());
                }
            };
            turn(&world, death);
            program.write_all(&text[first..]).unwrap();
            turn(&world, death / 2);
            turn(&world, usize::MAX);
            let mut connections = world.live().unwrap();
            let entry = connections.table.get(slot).unwrap();
            assert_eq!(entry.machine.phase(), Phase::Requesting);
            assert_eq!(entry.ports.map(|ports| ports.guest), Some(1024));
            let mut rest = [0; 32];
            let socket = entry.socket.as_ref().unwrap();
            assert_eq!(socket.peek_line(&mut rest).unwrap(), 5);
            assert_eq!(&rest[..5], b"hello");
            if death > 60 {
                break;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Nothing that stands in the memory stops a process otherwise than by a refusal.
    #[test]
    fn whatever_stands_in_the_memory_is_taken_up_or_refused(
        words in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), any::<bool>()), 1..20),
    ) {
        let mut world = World::new();
        for port in 0..3 {
            world.add(open(), Some(Ports { host: 2, guest: port }));
        }
        world.add(Connection::greeting(), None);
        for (index, value, is_small) in words {
            scribble(&world.state, index, if is_small { value % 9 } else { value });
        }
        if let Ok(mut connections) = world.live() {
            connections.watch_all(&mut NoSources).unwrap();
            let life = Life { rx: 7, tx: 9, features: 1 };
            connections.forget_guest(life, 0, &mut NoSources).unwrap();
            connections.watch_all(&mut NoSources).unwrap();
            prop_assert!(connections.are_known_to(life));
        }
    }
}
