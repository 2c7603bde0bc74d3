//! Frames from the guest.

use std::time::Duration;

use backend_daemon::testing::Buffer;

use crate::frames::{GSO_TCPV4, Header, NEEDS_CSUM, TRANSMIT, connect, frame, send, tcp};
use crate::host::{Host, make_persistent, own_network, serve};

/// Long enough for a frame that must not come.
const NOTHING: Duration = Duration::from_millis(100);

#[test]
fn a_frame_of_the_guest_appears_on_the_tap_however_it_is_cut() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let sent = frame(1, 100);
    send(&mut driver, Header::default(), &sent);
    assert_eq!(host.receive().1, sent);

    let whole = [Header::default().bytes(), sent.clone()].concat();
    for cut in [1, 5, 11, 13, 20] {
        let buffers = [Buffer::Out(&whole[..cut]), Buffer::Out(&whole[cut..])];
        let request = driver.submit(TRANSMIT, &buffers);
        assert_eq!(driver.wait(TRANSMIT, request).written_bytes, 0);
        assert_eq!(host.receive().1, sent, "cut at {cut}");
    }
}

#[test]
fn frames_go_out_in_their_order_and_once() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let header = Header::default().bytes();
    let mut requests = Vec::new();
    for number in 0..30 {
        let frame = frame(number, 60);
        requests.push(driver.offer(TRANSMIT, &[Buffer::Out(&header), Buffer::Out(&frame)]));
    }
    driver.kick(TRANSMIT);
    for number in 0..30 {
        assert_eq!(host.receive().1, frame(number, 60));
    }
    for request in requests {
        driver.wait(TRANSMIT, request);
    }
    assert!(!host.wait(NOTHING));
}

#[test]
fn a_packet_to_be_segmented_passes_whole() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let sent = tcp(1000, 40_000);
    send(&mut driver, Header::SEGMENTS, &sent);
    let (header, received) = host.receive();
    assert_eq!(received, sent);
    assert_eq!(header[..2], [NEEDS_CSUM, GSO_TCPV4]);
    assert_eq!(header[4..6], 1448_u16.to_le_bytes());
}

#[test]
fn a_malformed_frame_is_dropped_and_the_next_one_goes_out() {
    if !own_network() {
        return;
    }
    let mut daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    let good = frame(7, 60);
    let no_size = Header { gso_size: 0, ..Header::SEGMENTS };
    let no_checksum = Header { flags: 0, ..Header::SEGMENTS };
    let unknown = Header { gso_type: 0x7f, ..Header::SEGMENTS };
    let outside = Header { flags: NEEDS_CSUM, csum_start: 60_000, ..Header::default() };
    let headers = Header { hdr_len: 60_000, ..Header::SEGMENTS };
    for (what, header) in [
        ("no size", no_size),
        ("no checksum", no_checksum),
        ("unknown", unknown),
        ("outside", outside),
        ("headers", headers),
    ] {
        send(&mut driver, header, &tcp(1, 3000));
        send(&mut driver, Header::default(), &good);
        assert_eq!(host.receive().1, good, "{what}");
    }
    let header = Header::default().bytes();
    let long = vec![0; 70_000];
    let malformed: [&[Buffer<'_>]; 6] = [
        &[Buffer::Out(&header[..11])],
        &[Buffer::Out(&header)],
        &[Buffer::Out(&header), Buffer::Out(&good[..13])],
        &[Buffer::Out(&header), Buffer::Out(&long)],
        &[Buffer::In(100)],
        &[Buffer::Out(&header), Buffer::In(100)],
    ];
    for (number, buffers) in malformed.iter().enumerate() {
        let request = driver.submit(TRANSMIT, buffers);
        assert_eq!(driver.wait(TRANSMIT, request).written_bytes, 0);
        send(&mut driver, Header::default(), &good);
        assert_eq!(host.receive().1, good, "after {number}");
    }
    assert!(daemon.is_running());
    assert!(daemon.log().contains("frames from the guest"));
}

#[test]
fn an_interface_that_is_down_loses_frames_and_nothing_else() {
    if !own_network() {
        return;
    }
    let daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    host.set_up(false);
    send(&mut driver, Header::default(), &frame(1, 60));
    host.set_up(true);
    send(&mut driver, Header::default(), &frame(2, 60));
    assert_eq!(host.receive().1, frame(2, 60));
}

#[test]
fn a_frontend_that_comes_back_and_a_daemon_that_is_replaced_go_on() {
    if !own_network() {
        return;
    }
    make_persistent();
    let mut daemon = serve(&[]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    send(&mut driver, Header::default(), &frame(1, 60));
    driver.reconnect(&daemon.socket());
    send(&mut driver, Header::default(), &frame(2, 60));
    assert_eq!(daemon.terminate().code(), Some(0));

    let replaced = serve(&[]);
    driver.reconnect(&replaced.socket());
    send(&mut driver, Header::default(), &frame(3, 60));
    for number in 1..=3 {
        assert_eq!(host.receive().1, frame(number, 60));
    }
    assert!(!host.wait(NOTHING), "a frame came twice");
}
