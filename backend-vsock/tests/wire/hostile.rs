//! What no driver sends. The device goes on for everybody else.

use std::cell::RefCell;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use backend_daemon::testing::Buffer;
use backend_vsock::connections::RESETS_MAX;
use backend_vsock::credit::BUFFER_BYTES;
use backend_vsock::packet::{Cid, HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::guest::{Guest, SILENCE, Stream};
use crate::program::{CID, Device, accept, greeted, noise, read, read_all};

/// A device and a guest with one honest connection, which has to survive.
fn with_bystander() -> (Device, Guest, UnixStream, Stream) {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(9999);
    let stream = guest.grant(1 << 16);
    greeted(&mut program);
    (device, guest, program, stream)
}

fn still_works(guest: &mut Guest, program: &mut UnixStream, stream: &mut Stream) {
    program.write_all(b"ping").unwrap();
    assert_eq!(stream.read(guest, 4), b"ping");
    stream.send(guest, b"pong");
    assert_eq!(read(program, 4), b"pong");
}

fn stray(op: u16) -> Header {
    Header {
        src_cid: Cid(CID),
        dst_cid: HOST_CID,
        src_port: 70,
        dst_port: 71,
        len_bytes: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset() {
    let (_device, mut guest, mut program, mut stream) = with_bystander();
    for op in [0, 1, 2, 4, 5, 6, 7, 8, u16::MAX] {
        guest.send(stray(op), &[]);
        let reset = guest.expect(Op::Reset);
        assert_eq!((reset.header.src_port, reset.header.dst_port), (71, 70));
    }
    guest.send(stray(3), &[]);
    guest.expect_silence();
    still_works(&mut guest, &mut program, &mut stream);
}

#[test]
fn other_types_and_other_machines_are_refused_and_other_senders_ignored() {
    let (_device, mut guest, mut program, mut stream) = with_bystander();
    let mut seqpacket = stream.header(Op::Data, 0);
    seqpacket.kind = 2;
    guest.send(seqpacket, &[]);
    assert_eq!(guest.expect(Op::Reset).header.kind, 2);
    let mut sibling = stray(1);
    sibling.dst_cid = Cid(77);
    guest.send(sibling, &[]);
    assert_eq!(guest.expect(Op::Reset).header.src_cid, Cid(77));
    for cid in [0, 1, 2, CID + 1, CID | 1 << 32, u64::MAX] {
        let mut forged = stray(1);
        forged.src_cid = Cid(cid);
        guest.send(forged, &[]);
    }
    guest.expect_silence();
    still_works(&mut guest, &mut program, &mut stream);
}

#[test]
fn a_packet_that_claims_more_than_its_chain_ends_its_connection() {
    let (device, mut guest, mut program, mut stream) = with_bystander();
    for (len_bytes, payload) in [(1, 0), (101, 100), (u32::MAX, 100)] {
        let mut victim = device.ask(1);
        let liar = guest.grant(4096);
        greeted(&mut victim);
        let header = Header { len_bytes, ..liar.header(Op::Data, 0) };
        guest.send(header, &vec![0; payload]);
        assert_eq!(guest.expect(Op::Reset).ports(), liar.ports);
        assert_eq!(read_all(&mut victim), b"");
    }
    still_works(&mut guest, &mut program, &mut stream);
}

#[test]
fn a_guest_that_overruns_its_credit_loses_the_connection_but_no_accepted_byte() {
    let (device, mut guest, mut program, mut stream) = with_bystander();
    let listener = device.listen(1);
    let mut greedy = guest.dial(1, 1, 0);
    let mut victim = accept(&listener);
    let mut sent = Vec::new();
    // Without a look at the credit: the program's socket fills up, then the device's buffer.
    let reset = loop {
        let bytes = noise(16 << 10, sent.len() as u64);
        greedy.send(&mut guest, &bytes);
        sent.extend(bytes);
        assert!(sent.len() < 64 << 20, "nobody stops the guest");
        if let Some(packet) = guest.next_for(Duration::ZERO)
            && packet.op() == Op::Reset
        {
            break packet;
        }
    };
    assert_eq!(reset.ports(), greedy.ports);
    let got = read_all(&mut victim);
    assert!(got.len() >= BUFFER_BYTES as usize);
    assert!(got.len() < sent.len() && sent.starts_with(&got));
    still_works(&mut guest, &mut program, &mut stream);
}

#[test]
fn bytes_before_the_answer_and_after_the_end_end_the_connection() {
    let (device, mut guest, mut program, mut stream) = with_bystander();
    let mut asked = device.ask(1);
    let request = guest.expect(Op::Request);
    let mut early = request.header.reset();
    early.op = Op::Data.number();
    guest.send(early, &[]);
    guest.expect(Op::Reset);
    assert_eq!(read_all(&mut asked), b"");

    let mut ended = device.ask(2);
    let mut late = guest.grant(4096);
    greeted(&mut ended);
    late.say(&mut guest, Op::Shutdown, 2);
    late.send(&mut guest, b"x");
    guest.expect(Op::Reset);
    assert_eq!(read_all(&mut ended), b"");
    still_works(&mut guest, &mut program, &mut stream);
}

#[test]
fn chains_too_short_for_a_packet_are_given_back_unused() {
    let (_device, mut guest, mut program, mut stream) = with_bystander();
    guest.send_raw(&[&[0; HEADER_BYTES - 1]]);
    guest.send_raw(&[&[]]);
    let header = stream.header(Op::CreditUpdate, 0).to_bytes();
    // A header in pieces is as good as any.
    guest.send_raw(&[&header[..7], &header[7..30], &header[30..]]);
    still_works(&mut guest, &mut program, &mut stream);
}

#[test]
fn buffers_too_short_for_a_packet_are_given_back_unused() {
    let device = Device::start();
    let mut guest = Guest::starved(&device.daemon.socket());
    let short: Vec<_> =
        [1, 43, 44].map(|len| guest.driver.submit(0, &[Buffer::In(len)])).into_iter().collect();
    let mut program = device.ask(1);
    guest.feed(4);
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    for request in short {
        assert_eq!(guest.driver.wait(0, request).written_bytes, 0);
    }
    still_works(&mut guest, &mut program, &mut stream);
}

#[test]
fn resets_that_nobody_has_room_for_stop_the_guest_and_none_is_lost() {
    let device = Device::start();
    let mut guest = Guest::starved(&device.daemon.socket());
    let stray = |src_port| Header { src_port, ..stray(5) };
    let kept = u32::try_from(RESETS_MAX).unwrap();
    for port in 0..kept {
        guest.send(stray(port), &[]);
    }
    // As many as the device keeps; the rest has to stay in the ring.
    let rest: Vec<_> = (kept..kept + 20).map(|port| guest.post(stray(port), &[])).collect();
    assert!(guest.driver.wait_for(1, rest[0], SILENCE).is_none());
    guest.feed(8);
    for port in 0..kept + 20 {
        assert_eq!(guest.expect(Op::Reset).header.dst_port, port);
    }
    for request in rest {
        guest.taken(request);
    }
    guest.expect_silence();
}

#[test]
fn no_packet_whatsoever_stops_the_device() {
    let (mut device, guest, program, stream) = with_bystander();
    let mut state = (guest, program, stream);
    let mut runner =
        TestRunner::new(Config { cases: 2000, failure_persistence: None, ..Config::default() });
    let known = [CID, 0, 2, u64::MAX];
    let header = (
        prop::sample::select(known.to_vec()),
        prop::sample::select(vec![2_u64, CID, 1, u64::MAX]),
        0_u32..4,
        0_u32..4,
        prop::sample::select(vec![0_u32, 1, 64, 4096, u32::MAX]),
        0_u16..4,
        0_u16..10,
        (any::<u32>(), any::<u32>(), any::<u32>()),
    );
    let listeners: Vec<_> = (0..3).map(|port| device.listen(port)).collect();
    let guest = RefCell::new(&mut state.0);
    runner
        .run(&(header, 0_usize..200), |(header, payload)| {
            let (src, dst, src_port, dst_port, len_bytes, kind, op, rest) = header;
            let (flags, buf_alloc, fwd_cnt) = rest;
            let (src_cid, dst_cid) = (Cid(src), Cid(dst));
            let header = Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len_bytes,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            let mut guest = guest.borrow_mut();
            guest.send(header, &vec![0; payload]);
            while guest.next_for(Duration::ZERO).is_some() {}
            Ok(())
        })
        .unwrap();
    drop(listeners);
    while state.0.next_for(SILENCE).is_some() {}
    still_works(&mut state.0, &mut state.1, &mut state.2);
    assert!(device.daemon.is_running());
}
