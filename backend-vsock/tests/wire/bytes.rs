//! Bytes in flight: credit, starvation, fairness, and many connections.

use std::io::{Read, Write};
use std::thread;

use backend_vsock::credit::BUFFER_BYTES;
use backend_vsock::packet::Op;

use crate::guest::{Guest, SILENCE, Stream};
use crate::program::{Device, accept, greeted, noise, read, read_all};

/// The guest sends back what it gets, as far as it has credit; its own buffer is small.
fn echo(guest: &mut Guest, stream: &mut Stream, len: usize) {
    let mut held: Vec<u8> = Vec::new();
    let (mut got, mut returned) = (0, 0);
    while returned < len {
        let credit = usize::try_from(stream.credit()).unwrap().min(held.len());
        if credit > 0 {
            let bytes: Vec<u8> = held.drain(..credit).collect();
            stream.send(guest, &bytes);
            returned += credit;
            continue;
        }
        let packet = guest.next();
        assert_eq!(packet.ports(), stream.ports);
        stream.hear(&packet.header);
        got += packet.payload.len();
        held.extend(&packet.payload);
        match packet.op() {
            Op::Data | Op::CreditUpdate | Op::CreditRequest => {}
            other => panic!("unexpected {other:?}"),
        }
        // Data tells of the guest's buffer along the way; without any, it has to be told.
        if stream.credit() == 0 || held.is_empty() {
            stream.say(guest, Op::CreditUpdate, 0);
        }
    }
    assert_eq!((got, held.len()), (len, 0));
}

#[test]
fn megabytes_come_back_unchanged_through_a_small_guest_buffer() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut writer = device.ask(1);
    let mut stream = guest.grant(4096);
    greeted(&mut writer);
    let bytes = noise(6 << 20, 2);
    let mut reader = writer.try_clone().unwrap();
    let sent = bytes.clone();
    let write = thread::spawn(move || writer.write_all(&sent).unwrap());
    let expected = bytes.len();
    let back = thread::spawn(move || read(&mut reader, expected));
    echo(&mut guest, &mut stream, bytes.len());
    write.join().unwrap();
    assert!(back.join().unwrap() == bytes);
}

#[test]
fn the_device_never_sends_beyond_the_guests_credit() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let mut stream = guest.grant(10_000);
    greeted(&mut program);
    let bytes = noise(25_000, 3);
    program.write_all(&bytes).unwrap();
    let mut got = Vec::new();
    while got.len() < 10_000 {
        let packet = guest.expect(Op::Data);
        stream.hear(&packet.header);
        got.extend(packet.payload);
    }
    assert_eq!(got.len(), 10_000);
    guest.expect(Op::CreditRequest);
    guest.expect_silence();
    stream.say(&mut guest, Op::CreditUpdate, 0);
    got.extend(stream.read(&mut guest, 15_000));
    assert!(got == bytes);
}

#[test]
fn a_guest_without_buffers_stalls_and_loses_nothing() {
    let device = Device::start();
    let mut guest = Guest::starved(&device.daemon.socket());
    let mut programs: Vec<_> = (0..10).map(|port| device.ask(port)).collect();
    for (port, program) in (0_u64..).zip(&mut programs) {
        program.write_all(&noise(5000, port)).unwrap();
    }
    guest.feed(1);
    let streams: Vec<Stream> = (0..10).map(|_program| guest.grant(1 << 20)).collect();
    let mut got = vec![Vec::new(); streams.len()];
    while got.iter().map(Vec::len).sum::<usize>() < 50_000 {
        let packet = guest.expect(Op::Data);
        got[packet.header.dst_port as usize].extend(packet.payload);
    }
    for (port, bytes) in (0_u64..).zip(got) {
        assert!(bytes == noise(5000, port), "port {port}");
    }
}

#[test]
fn a_host_program_that_does_not_read_withholds_credit() {
    let device = Device::start();
    let listener = device.listen(1);
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut stream = guest.dial(1, 1, 0);
    let mut program = accept(&listener);
    let mut sent = 0;
    // The program's own socket takes some, then the device's buffer its share; then no more.
    while stream.credit() > 0 {
        let len = usize::try_from(stream.credit()).unwrap().min(16 << 10);
        let bytes = noise(sent + len, 4).split_off(sent);
        stream.send(&mut guest, &bytes);
        sent += len;
        assert!(sent < 64 << 20, "the device buffers without end");
        if stream.credit() == 0 {
            stream.say(&mut guest, Op::CreditRequest, 0);
            while let Some(packet) = guest.next_for(SILENCE) {
                assert_eq!(packet.op(), Op::CreditUpdate);
                stream.hear(&packet.header);
            }
        }
    }
    assert!(sent >= BUFFER_BYTES as usize);
    assert!(read(&mut program, sent) == noise(sent, 4));
    stream.hear(&guest.expect(Op::CreditUpdate).header);
    assert!(stream.credit() > 0);
}

#[test]
fn a_chatty_program_does_not_silence_a_quiet_one() {
    let device = Device::start();
    let mut guest = Guest::starved(&device.daemon.socket());
    let mut chatty = device.ask(1);
    guest.feed(1);
    let loud = guest.grant(u32::MAX);
    greeted(&mut chatty);
    let mut quiet = device.ask(2);
    let silent = guest.grant(4096);
    greeted(&mut quiet);
    let chatter = thread::spawn(move || {
        let bytes = noise(1 << 20, 5);
        // Until the device hangs up.
        while chatty.write_all(&bytes).is_ok() {}
    });
    for _ in 0..100 {
        assert_eq!(guest.expect(Op::Data).ports(), loud.ports);
    }
    quiet.write_all(b"!").unwrap();
    // What the device has not put into the one buffer yet comes in turn.
    let waited = (0..20).position(|_turn| guest.next().ports() == silent.ports);
    assert!(waited.is_some(), "the quiet program is not heard");
    silent.say(&mut guest, Op::Shutdown, 3);
    drop(device);
    chatter.join().unwrap();
}

#[test]
fn hundreds_of_connections_at_once_keep_their_bytes_apart() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut pairs: Vec<_> = (0..300)
        .map(|port| {
            let mut program = device.ask(port);
            let stream = guest.grant(1 << 16);
            assert_eq!(stream.ports.guest, port);
            greeted(&mut program);
            (program, stream)
        })
        .collect();
    for (program, stream) in &mut pairs {
        program.write_all(&noise(1000, stream.ports.guest.into())).unwrap();
        let bytes = noise(2000, u64::from(stream.ports.guest) + 1000);
        stream.send(&mut guest, &bytes);
    }
    let mut got = vec![Vec::new(); pairs.len()];
    while got.iter().map(Vec::len).sum::<usize>() < 1000 * pairs.len() {
        let packet = guest.expect(Op::Data);
        got[packet.header.dst_port as usize].extend(packet.payload);
    }
    for ((program, stream), bytes) in pairs.iter_mut().zip(got) {
        let port = u64::from(stream.ports.guest);
        assert!(bytes == noise(1000, port));
        assert!(read(program, 2000) == noise(2000, port + 1000));
        program.set_nonblocking(true).unwrap();
        assert!(program.read(&mut [0]).is_err(), "a byte too many on port {port}");
    }
}

#[test]
fn memory_for_bytes_under_way_comes_and_goes_inside_the_jail() {
    let mut device = Device::start();
    let listener = device.listen(1);
    let mut guest = Guest::connect(&device.daemon.socket());
    for _round in 0..2 {
        let mut pairs: Vec<_> = (0..10)
            .map(|port| {
                let mut stream = guest.dial(1, port, 0);
                let program = accept(&listener);
                let bytes = stream.fill(&mut guest);
                (stream, program, bytes)
            })
            .collect();
        for (stream, program, bytes) in &mut pairs {
            stream.say(&mut guest, Op::Reset, 0);
            assert!(read_all(program) == *bytes);
        }
    }
    assert!(device.daemon.is_running());
}
