//! Frames to the guest.

use std::fs;
use std::time::Duration;

use backend_daemon::testing::{Daemon, Driver, Options};

use crate::frames::{GSO_TCPV4, Header, NEEDS_CSUM, RECEIVE, connect, frame, offer, take, tcp};
use crate::host::{Host, PACKET_HEADER_BYTES, make_persistent, own_network, serve};

/// Long enough for a frame that must not come.
const NOTHING: Duration = Duration::from_millis(100);

const MRG_RXBUF: u64 = 1 << 15;
const GUEST_TSO4: u64 = 1 << 7;

fn segments() -> Vec<u8> {
    let mut header = Header::SEGMENTS.bytes();
    header.truncate(PACKET_HEADER_BYTES);
    header
}

/// How much processor time the daemon has used, in hundredths of a second.
fn ticks(daemon: &Daemon) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.id())).unwrap();
    let (_name, fields) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = fields.split(' ').collect();
    // utime and stime; the first field here is the third of the line.
    fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_frame_into_the_tap_arrives_in_a_buffer_of_the_guest() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let mut buffers = offer(&mut driver, RECEIVE, 4, 2048);
    for number in 0..4 {
        let sent = frame(number, 100 + usize::from(number));
        host.send(&sent);
        let (header, received) = take(&mut driver, &mut buffers);
        assert_eq!(received, sent);
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
    assert!(buffers.is_empty());
}

#[test]
fn a_big_packet_comes_whole_in_several_buffers_and_takes_no_more_than_it_needs() {
    if !own_network() {
        return;
    }
    for event_idx in [true, false] {
        let daemon = serve(&[]);
        let host = Host::listen();
        let options = Options { queues: 2, event_idx, ..Options::default() };
        let mut driver = Driver::connect(&daemon.socket(), &options);
        let mut buffers = offer(&mut driver, RECEIVE, 60, 2048);
        // The first one is longer than expected and spills, the second is read in place.
        for number in 0..2 {
            let sent = tcp(number, 40_000);
            host.send_with(&segments(), &sent);
            let before = buffers.len();
            let (header, received) = take(&mut driver, &mut buffers);
            assert_eq!(received, sent);
            assert_eq!(header[..2], [NEEDS_CSUM, GSO_TCPV4]);
            assert_eq!(before - buffers.len(), (12 + sent.len()).div_ceil(2048));
        }
        let left = buffers.len();
        assert_eq!(driver.in_flight(RECEIVE), left, "buffers were lost");
        host.send(&frame(3, 60));
        assert_eq!(take(&mut driver, &mut buffers).1, frame(3, 60));
    }
}

#[test]
fn a_driver_without_segmentation_gets_a_big_packet_in_segments() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let features = !GUEST_TSO4;
    let options = Options { queues: 2, features, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let mut buffers = offer(&mut driver, RECEIVE, 60, 2048);
    host.send_with(&segments(), &tcp(1, 3 * 1448));
    for _ in 0..3 {
        let (header, received) = take(&mut driver, &mut buffers);
        assert_eq!(received.len(), 54 + 1448);
        assert_eq!(header[1], 0);
    }
}

#[test]
fn without_mergeable_buffers_a_frame_that_is_too_long_is_lost_and_the_next_one_comes() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let options = Options { queues: 2, features: !MRG_RXBUF, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let mut buffers = offer(&mut driver, RECEIVE, 4, 500);
    host.send(&frame(1, 800));
    host.send(&frame(2, 200));
    let (header, received) = take(&mut driver, &mut buffers);
    assert_eq!(received, frame(2, 200));
    assert_eq!(header[10..], [1, 0]);
}

#[test]
fn without_buffers_frames_wait_in_the_tap_until_a_kick() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    for number in 0..5 {
        host.send(&frame(number, 60));
    }
    let mut buffers = offer(&mut driver, RECEIVE, 2, 2048);
    assert_eq!(take(&mut driver, &mut buffers).1, frame(0, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(1, 60));
    let mut buffers = offer(&mut driver, RECEIVE, 8, 2048);
    for number in 2..5 {
        assert_eq!(take(&mut driver, &mut buffers).1, frame(number, 60));
    }
}

#[test]
fn a_big_packet_with_too_few_buffers_waits_for_more() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let sent = tcp(1, 20_000);
    host.send_with(&segments(), &sent);
    let mut buffers = offer(&mut driver, RECEIVE, 3, 2048);
    let request = buffers[0];
    assert_eq!(driver.wait_for(RECEIVE, request, NOTHING), None, "a part of a packet came");
    buffers.extend(offer(&mut driver, RECEIVE, 3, 2048));
    assert_eq!(driver.wait_for(RECEIVE, request, NOTHING), None, "a part of a packet came");
    assert!(ticks(&daemon) < 10, "the worker spins while it waits");
    buffers.extend(offer(&mut driver, RECEIVE, 10, 2048));
    assert_eq!(take(&mut driver, &mut buffers).1, sent);
    host.send(&frame(2, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(2, 60));
}

#[test]
fn a_queue_that_stops_gives_back_every_buffer() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let mut buffers = offer(&mut driver, RECEIVE, 3, 2048);
    host.send(&frame(1, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(1, 60));
    // This one holds both buffers and waits; it is lost with the queue.
    host.send_with(&segments(), &tcp(1, 20_000));
    assert_eq!(driver.wait_for(RECEIVE, buffers[0], NOTHING), None);
    assert_eq!(driver.stop_queue(RECEIVE), 1);
    driver.start_queue(RECEIVE, 1);
    host.send(&frame(2, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(2, 60));
}

#[test]
fn a_buffer_where_no_frame_fits_comes_back_empty() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let useless = offer(&mut driver, RECEIVE, 1, 11);
    let mut buffers = offer(&mut driver, RECEIVE, 1, 2048);
    host.send(&frame(1, 60));
    assert_eq!(driver.wait(RECEIVE, useless[0]).written_bytes, 0);
    assert_eq!(take(&mut driver, &mut buffers).1, frame(1, 60));
}

#[test]
fn buffers_offered_before_a_daemon_was_replaced_are_filled_without_a_kick() {
    if !own_network() {
        return;
    }
    make_persistent();
    let mut daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let mut buffers = offer(&mut driver, RECEIVE, 4, 2048);
    host.send(&frame(1, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(1, 60));
    daemon.signal(rustix::process::Signal::KILL);
    daemon.wait();
    let replaced = serve(&[]);
    driver.reconnect(&replaced.socket());
    host.send(&frame(2, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(2, 60));
    driver.reconnect(&replaced.socket());
    host.send(&frame(3, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(3, 60));
}

#[test]
fn each_page_of_a_frame_in_several_buffers_is_logged_while_a_frontend_moves_the_guest() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let options = Options { queues: 2, memory_bytes: 1 << 20, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let mut buffers = offer(&mut driver, RECEIVE, 30, 2048);
    let log = driver.log_dirty();
    let before = driver.pages();
    host.send_with(&segments(), &tcp(1, 40_000));
    let (_header, received) = take(&mut driver, &mut buffers);
    assert_eq!(received, tcp(1, 40_000));
    let logged = log.pages();
    let changed = driver.pages().into_iter().filter(|(page, now)| before[page] != *now);
    let changed: Vec<u64> = changed.map(|(page, _now)| page).collect();
    assert!(changed.len() > 20, "{changed:?}");
    assert!(changed.iter().all(|page| logged.contains(page)), "{changed:?} {logged:?}");
}
