//! Half-closes, closes, and what must arrive before them.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;

use backend_daemon::testing::DEADLINE;
use backend_vsock::packet::Op;

use crate::guest::{Guest, SILENCE};
use crate::program::{Device, accept, greeted, noise, read, read_all};

const RECEIVE: u32 = 1;
const SEND: u32 = 2;
const BOTH: u32 = RECEIVE | SEND;

#[test]
fn a_program_that_is_done_sending_can_still_receive() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let mut stream = guest.grant(1 << 16);
    greeted(&mut program);
    program.write_all(b"last words").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut guest, 10), b"last words");
    assert_eq!(guest.expect(Op::Shutdown).header.flags, SEND);
    stream.send(&mut guest, b"reply");
    assert_eq!(read(&mut program, 5), b"reply");
    guest.expect_silence();
    stream.say(&mut guest, Op::Shutdown, BOTH);
    guest.expect(Op::Reset);
    assert_eq!(read_all(&mut program), b"");
}

#[test]
fn a_guest_that_is_done_sending_can_still_receive() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let mut stream = guest.grant(1 << 16);
    greeted(&mut program);
    stream.send(&mut guest, b"last words");
    stream.say(&mut guest, Op::Shutdown, SEND);
    assert_eq!(read_all(&mut program), b"last words");
    program.write_all(b"reply").unwrap();
    assert_eq!(stream.read(&mut guest, 5), b"reply");
    drop(program);
    let mut told = 0;
    while told != BOTH {
        told |= guest.expect(Op::Shutdown).header.flags;
    }
    stream.say(&mut guest, Op::Reset, 0);
    guest.expect_silence();
}

#[test]
fn a_guest_that_is_done_receiving_can_still_send() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let mut stream = guest.grant(1 << 16);
    greeted(&mut program);
    stream.say(&mut guest, Op::Shutdown, RECEIVE);
    stream.send(&mut guest, b"still here");
    assert_eq!(read(&mut program, 10), b"still here");
    assert_eq!(program.write_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    stream.say(&mut guest, Op::Shutdown, SEND);
    guest.expect(Op::Reset);
    assert_eq!(read_all(&mut program), b"");
}

#[test]
fn a_program_that_closes_delivers_all_it_wrote() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    // The guest has no room yet: everything is still in the program's socket when it closes.
    let mut stream = guest.grant(0);
    greeted(&mut program);
    let bytes = noise(60_000, 1);
    program.write_all(&bytes).unwrap();
    drop(program);
    stream.resize(8192);
    stream.say(&mut guest, Op::CreditUpdate, 0);
    let mut got = Vec::new();
    let mut told = 0;
    while told != BOTH {
        let packet = guest.next();
        stream.hear(&packet.header);
        match packet.op() {
            Op::Data => {
                assert_eq!(told & SEND, 0, "bytes after the end");
                got.extend(packet.payload);
                stream.say(&mut guest, Op::CreditUpdate, 0);
            }
            Op::Shutdown => told |= packet.header.flags,
            Op::CreditRequest => stream.say(&mut guest, Op::CreditUpdate, 0),
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(got == bytes);
}

#[test]
fn a_guest_that_closes_delivers_all_it_sent_before_the_reset() {
    let device = Device::start();
    let listener = device.listen(1);
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut stream = guest.dial(1, 1, 0);
    let mut program = accept(&listener);
    let bytes = stream.fill(&mut guest);
    stream.say(&mut guest, Op::Shutdown, BOTH);
    guest.expect_silence();
    assert!(read_all(&mut program) == bytes);
    loop {
        match guest.next_for(DEADLINE).unwrap().op() {
            Op::Reset => break,
            Op::CreditUpdate => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[test]
fn a_guest_that_resets_delivers_what_was_accepted() {
    let device = Device::start();
    let listener = device.listen(1);
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut stream = guest.dial(1, 1, 0);
    let mut program = accept(&listener);
    let bytes = stream.fill(&mut guest);
    stream.say(&mut guest, Op::Reset, 0);
    // The same ports can be used at once, while the old bytes are still on their way.
    let mut again = guest.dial(1, 1, 0);
    let mut second = accept(&listener);
    again.send(&mut guest, b"new");
    assert_eq!(read(&mut second, 3), b"new");
    assert!(read_all(&mut program) == bytes);
    guest.expect_silence();
}

#[test]
fn bytes_for_a_program_that_is_gone_do_not_use_up_credit() {
    let device = Device::start();
    let listener = device.listen(1);
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut stream = guest.dial(1, 1, 4096);
    drop(accept(&listener));
    let mut told = 0;
    let mut sent = 0;
    while told != BOTH || sent < 1 << 20 {
        let credit = usize::try_from(stream.credit()).unwrap().min(16 << 10);
        if credit > 0 && sent < 1 << 20 {
            stream.send(&mut guest, &vec![0; credit]);
            sent += credit;
            continue;
        }
        let packet = guest.next();
        stream.hear(&packet.header);
        match packet.op() {
            Op::Shutdown => told |= packet.header.flags,
            Op::CreditUpdate => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[test]
fn a_program_that_is_gone_while_the_guest_keeps_its_end_costs_no_time() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let stream = guest.grant(4096);
    greeted(&mut program);
    // Unread bytes keep the stream's end from the guest, which has no buffer for more.
    program.write_all(&[1; 10_000]).unwrap();
    drop(program);
    while guest.next_for(SILENCE).is_some() {}
    let before = cpu_ticks(device.daemon.id());
    guest.expect_silence();
    assert!(cpu_ticks(device.daemon.id()) - before <= 3, "the device spins");
    stream.say(&mut guest, Op::Reset, 0);
}

/// The time that a process has spent in both modes: fields 14 and 15 of its stat (proc(5)).
fn cpu_ticks(process: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}
