//! One restart at a time: what a successor takes up, what it can't, and what it does not touch.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use backend_daemon::testing::{Buffer, DEADLINE};
use backend_vsock::keep::{Key, Origin};
use backend_vsock::packet::Op;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::guest::{EVENT, Guest, SILENCE, Stream};
use crate::program::{Device, accept, greeted, noise, patient, read, read_all};
use crate::supervisor::{Supervisor, reconnected};

const BOTH: u32 = 3;

/// A device under a supervisor, and a guest.
fn start() -> (Supervisor, Device, Guest) {
    let (supervisor, device) = Supervisor::start();
    let guest = Guest::connect(&device.daemon.socket());
    (supervisor, device, guest)
}

fn replace(supervisor: &mut Supervisor, device: &mut Device, guest: &mut Guest) {
    supervisor.replace(device);
    guest.driver.reconnect(&device.daemon.socket());
}

#[test]
fn a_line_that_was_half_read_is_read_on_by_the_successor() {
    let (mut supervisor, mut device, mut guest) = start();
    let mut program = device.dial();
    program.write_all(b"CONN").unwrap();
    // Another one is served meanwhile, so the first was looked at.
    let mut other = device.ask(2);
    let _other = guest.grant(4096);
    greeted(&mut other);
    replace(&mut supervisor, &mut device, &mut guest);
    program.write_all(b"ECT 1\nhello").unwrap();
    let mut stream = guest.grant(4096);
    assert_eq!(stream.ports.guest, 1);
    assert_eq!(stream.read(&mut guest, 5), b"hello");
    greeted(&mut program);
}

#[test]
fn bytes_that_a_program_did_not_read_yet_wait_for_it_in_the_successor() {
    let (mut supervisor, mut device, mut guest) = start();
    let listener = device.listen(1);
    let mut stream = guest.dial(1, 1, 0);
    let mut program = accept(&listener);
    let bytes = stream.fill(&mut guest);
    replace(&mut supervisor, &mut device, &mut guest);
    stream.say(&mut guest, Op::Shutdown, BOTH);
    replace(&mut supervisor, &mut device, &mut guest);
    assert!(read_all(&mut program) == bytes);
    while guest.next().op() != Op::Reset {}
}

#[test]
fn hundreds_of_connections_are_taken_up_at_once() {
    // This process holds the other ends of them all, and plays the supervisor that keeps copies.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let (mut supervisor, mut device, mut guest) = start();
    let listener = device.listen(1);
    let mut pairs: Vec<_> = (0..600)
        .map(|port| {
            let stream = guest.dial(1, port, 1 << 16);
            // The device never waits for the supervisor.
            supervisor.take_in();
            (accept(&listener), stream)
        })
        .collect();
    replace(&mut supervisor, &mut device, &mut guest);
    for (port, (program, stream)) in (0..).zip(&mut pairs) {
        program.write_all(&noise(100, port)).unwrap();
        stream.send(&mut guest, &noise(100, port + 1000));
        assert!(stream.read(&mut guest, 100) == noise(100, port));
        assert!(read(program, 100) == noise(100, port + 1000));
    }
}

#[test]
fn programs_that_come_while_there_is_no_process_wait_for_one() {
    let (mut supervisor, mut device, mut guest) = start();
    supervisor.kill(&mut device);
    let mut program = device.ask(1);
    device.daemon = supervisor.spawn(&device.folder);
    guest.driver.reconnect(&device.daemon.socket());
    let _stream = guest.grant(4096);
    greeted(&mut program);
}

#[test]
fn a_planned_restart_goes_on_where_the_rings_were_drained() {
    let (mut supervisor, mut device, mut guest) = start();
    let mut program = device.ask(1);
    let mut stream = guest.grant(1 << 20);
    greeted(&mut program);
    for round in 0..5 {
        stream.send(&mut guest, &noise(1000, round));
        for queue in 0..3 {
            guest.driver.stop_queue(queue);
        }
        program.write_all(&noise(500, round)).unwrap();
        assert_eq!(device.daemon.terminate().code(), Some(0));
        supervisor.take_in();
        device.daemon = supervisor.spawn(&device.folder);
        guest.driver.reconnect(&device.daemon.socket());
        assert!(read(&mut program, 1000) == noise(1000, round));
        assert!(stream.read(&mut guest, 500) == noise(500, round));
    }
    // What is the supervisor's to remove is still there.
    assert!(device.path().exists());
}

#[test]
fn a_guest_that_began_anew_meanwhile_has_no_connections() {
    let (mut supervisor, mut device, mut guest) = start();
    let mut program = device.ask(1);
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    stream.send(&mut guest, b"farewell");
    supervisor.replace(&mut device);
    let mut next = Guest::connect(&device.daemon.socket());
    let event = next.driver.submit(EVENT, &[Buffer::In(8)]);
    assert_eq!(read_all(&mut program), b"farewell");
    let mut program = device.ask(2);
    let _stream = next.grant(4096);
    greeted(&mut program);
    assert!(next.driver.wait_for(EVENT, event, SILENCE).is_none());
}

#[test]
fn a_connection_whose_socket_was_lost_is_reset_and_the_others_go_on() {
    let (mut supervisor, mut device, mut guest) = start();
    let mut pairs: Vec<_> = (1..4)
        .map(|port| {
            let mut program = device.ask(port);
            let stream = guest.grant(4096);
            greeted(&mut program);
            (program, stream)
        })
        .collect();
    supervisor.kill(&mut device);
    let key = Key::Connection { slot: 1, generation: 2, from: Origin::Program };
    assert!(supervisor.kept.remove(&key.encode()).is_some());
    device.daemon = supervisor.spawn(&device.folder);
    guest.driver.reconnect(&device.daemon.socket());
    assert_eq!(guest.expect(Op::Reset).ports(), pairs[1].1.ports);
    assert_eq!(read_all(&mut pairs[1].0), b"");
    for pair in [0, 2] {
        let (program, stream) = &mut pairs[pair];
        stream.send(&mut guest, b"on we go");
        assert_eq!(read(program, 8), b"on we go");
    }
}

#[test]
fn sockets_that_nobody_knows_are_closed_and_a_program_that_was_just_accepted_is_served() {
    let (mut supervisor, mut device, mut guest) = start();
    let mut first = device.ask(1);
    let _first = guest.grant(4096);
    greeted(&mut first);
    supervisor.kill(&mut device);
    let mut put = |slot, generation, from| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let key = Key::Connection { slot, generation, from };
        supervisor.kept.insert(key.encode(), ours.into());
        patient(theirs)
    };
    let mut leftover = put(1, 1, Origin::Program);
    let mut fresh = put(5, 2, Origin::Program);
    let mut unasked = put(6, 2, Origin::Guest);
    device.daemon = supervisor.spawn(&device.folder);
    guest.driver.reconnect(&device.daemon.socket());
    fresh.write_all(b"CONNECT 9\n").unwrap();
    let mut stream = guest.grant(4096);
    assert_eq!(stream.ports.guest, 9);
    greeted(&mut fresh);
    stream.send(&mut guest, b"hello");
    assert_eq!(read(&mut fresh, 5), b"hello");
    assert_eq!(read_all(&mut leftover), b"");
    supervisor.take_in();
    // The listening socket, the pipe, and two connections; in particular not the last socket.
    assert_eq!(supervisor.kept.len(), 5);
    assert_eq!(unasked.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guest_that_asks_is_connected_once_wherever_the_process_dies() {
    for steps in 0..60 {
        let (mut supervisor, mut device, mut guest) = start();
        let listener = device.listen(1);
        supervisor.kill(&mut device);
        let mut stream = Stream::asking(1, 7, 4096);
        let asked = guest.post(stream.header(Op::Request, 0), &[]);
        device.daemon = supervisor.spawn_to_die(&device.folder, Some(steps));
        let mut response = None;
        if reconnected(&mut device, &mut guest) {
            while response.is_none() && device.daemon.is_running() {
                response = guest.next_for(Duration::from_millis(1));
            }
        }
        let lived = device.daemon.is_running();
        replace(&mut supervisor, &mut device, &mut guest);
        guest.taken(asked);
        let response = response.unwrap_or_else(|| guest.next());
        assert_eq!(response.op(), Op::Response);
        stream.hear(&response.header);
        let mut program = accept(&listener);
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "connected twice when it died after {steps} steps");
        stream.send(&mut guest, b"hello");
        assert_eq!(read(&mut program, 5), b"hello");
        if lived {
            return;
        }
    }
    panic!("it never lived long enough");
}

#[test]
fn state_that_cannot_be_read_is_refused_with_a_code_of_its_own_and_not_changed() {
    let (mut supervisor, mut device, mut guest) = start();
    let mut program = device.ask(1);
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    supervisor.kill(&mut device);
    supervisor.state.write_all_at(&2_u64.to_le_bytes(), 0).unwrap();
    let mut refusing = supervisor.spawn(&device.folder);
    assert_eq!(refusing.wait().code(), Some(6));
    assert!(refusing.log().contains("version 2"), "{}", refusing.log());
    supervisor.take_in();
    // The program that wrote it goes on.
    supervisor.state.write_all_at(&1_u64.to_le_bytes(), 0).unwrap();
    device.daemon = supervisor.spawn(&device.folder);
    guest.driver.reconnect(&device.daemon.socket());
    stream.send(&mut guest, b"as before");
    assert_eq!(read(&mut program, 9), b"as before");
}

#[test]
fn a_program_that_left_while_there_was_no_process_is_missed_by_the_successor() {
    let (mut supervisor, mut device, mut guest) = start();
    let mut program = device.ask(1);
    let mut stream = guest.grant(1 << 16);
    greeted(&mut program);
    supervisor.kill(&mut device);
    program.write_all(&noise(30_000, 1)).unwrap();
    drop(program);
    device.daemon = supervisor.spawn(&device.folder);
    guest.driver.reconnect(&device.daemon.socket());
    let mut got = Vec::new();
    let mut told = 0;
    while told != BOTH {
        let packet = guest.next_for(DEADLINE).unwrap();
        stream.hear(&packet.header);
        told |= if packet.op() == Op::Shutdown { packet.header.flags } else { 0 };
        got.extend(packet.payload);
    }
    assert!(got == noise(30_000, 1));
    stream.say(&mut guest, Op::Reset, 0);
}
