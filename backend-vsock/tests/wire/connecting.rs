//! Who connects to whom, and who is refused.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use backend_vsock::packet::{Cid, HOST_CID, Header, Op, TYPE_STREAM};

use crate::guest::Guest;
use crate::program::{CID, Device, accept, greeted, noise, read, read_all};

#[test]
fn a_host_program_reaches_a_guest_port_and_loses_no_byte_behind_its_line() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.dial();
    program.write_all(b"connect 1024\nhello").unwrap();
    let request = guest.expect(Op::Request);
    assert_eq!(request.header.src_cid, HOST_CID);
    assert_eq!(request.header.dst_port, 1024);
    assert_eq!(request.header.kind, TYPE_STREAM);
    assert!(request.header.buf_alloc > 0);
    let mut answer = request.header.reset();
    (answer.op, answer.buf_alloc) = (Op::Response.number(), 4096);
    guest.send(answer, &[]);
    assert_eq!(greeted(&mut program), request.header.src_port);
    assert_eq!(guest.expect(Op::Data).payload, b"hello");
}

#[test]
fn the_line_may_come_byte_by_byte() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.dial();
    for byte in b"CONNECT 9\r\n" {
        program.write_all(&[*byte]).unwrap();
    }
    let _stream = guest.grant(4096);
    greeted(&mut program);
}

#[test]
fn a_host_program_may_come_before_the_guest() {
    let device = Device::start();
    let mut program = device.ask(7);
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    program.write_all(b"early").unwrap();
    assert_eq!(stream.read(&mut guest, 5), b"early");
}

#[test]
fn a_host_program_sees_the_end_when_the_guest_refuses() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let request = guest.expect(Op::Request);
    guest.send(request.header.reset(), &[]);
    assert_eq!(read_all(&mut program), b"");
    guest.expect_silence();
}

#[test]
fn a_host_program_that_leaves_before_the_answer_costs_the_guest_a_reset() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let program = device.ask(1);
    let request = guest.expect(Op::Request);
    drop(program);
    let reset = guest.expect(Op::Reset);
    assert_eq!(reset.ports(), request.ports());
}

#[test]
fn a_program_that_speaks_another_language_is_hung_up_on() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    for words in ["GET / HTTP/1.1\n", "CONNECT 1 2\n", "CONNECT 99999999999999999999999999999999"] {
        let mut program = device.dial();
        program.write_all(words.as_bytes()).unwrap();
        match program.read(&mut [0; 8]) {
            Ok(0) => {}
            // The device left with our words unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{words:?}: {other:?}"),
        }
    }
    guest.expect_silence();
}

#[test]
fn of_too_many_silent_programs_the_oldest_has_to_go() {
    let device = Device::start();
    let _guest = Guest::connect(&device.daemon.socket());
    let mut oldest = device.dial();
    let _others: Vec<_> = (0..64).map(|_program| device.dial()).collect();
    assert_eq!(read_all(&mut oldest), b"");
}

#[test]
fn the_guest_reaches_a_host_program_by_its_port() {
    let device = Device::start();
    let listener = device.listen(4000);
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut stream = guest.dial(4000, 33, 1 << 16);
    let mut program = accept(&listener);
    let bytes = noise(100_000, 1);
    stream.send(&mut guest, &bytes);
    assert!(read(&mut program, bytes.len()) == bytes);
    program.write_all(&bytes).unwrap();
    assert!(stream.read(&mut guest, bytes.len()) == bytes);
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    // A socket file without a listener, no file at all, and a file that is no socket.
    drop(device.listen(1));
    fs::write(device.port_path(2), "").unwrap();
    for port in [1, 2, 3] {
        let mut header = guest_request(port);
        header.src_port = 100 + port;
        guest.send(header, &[]);
        let reset = guest.expect(Op::Reset);
        assert_eq!((reset.header.src_port, reset.header.dst_port), (port, 100 + port));
    }
}

#[test]
fn the_guest_reaches_nothing_outside_the_folder() {
    let device = Device::start();
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("precious");
    let _precious = UnixListener::bind(&path).unwrap();
    symlink(&path, device.port_path(80)).unwrap();
    let up = format!("../{}/precious", elsewhere.path().file_name().unwrap().display());
    symlink(up, device.port_path(81)).unwrap();
    let inside = device.listen(82);
    let mut guest = Guest::connect(&device.daemon.socket());
    for port in [80, 81] {
        guest.send(guest_request(port), &[]);
        guest.expect(Op::Reset);
    }
    let _stream = guest.dial(82, 1, 0);
    accept(&inside);
}

#[test]
fn a_second_request_on_the_same_ports_ends_the_connection() {
    let device = Device::start();
    let listener = device.listen(5);
    let mut guest = Guest::connect(&device.daemon.socket());
    let stream = guest.dial(5, 6, 4096);
    let mut program = accept(&listener);
    stream.say(&mut guest, Op::Request, 0);
    assert_eq!(guest.expect(Op::Reset).ports(), stream.ports);
    assert_eq!(read_all(&mut program), b"");
    // The ports are free again.
    let _again = guest.dial(5, 6, 4096);
}

fn guest_request(host_port: u32) -> Header {
    Header {
        src_cid: Cid(CID),
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: host_port,
        len_bytes: 0,
        kind: TYPE_STREAM,
        op: Op::Request.number(),
        flags: 0,
        buf_alloc: 4096,
        fwd_cnt: 0,
    }
}
