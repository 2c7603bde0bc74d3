//! How the program starts and ends, and several queue pairs.

use std::process::Command;

use backend_daemon::testing::{Buffer, Driver, Options};

use crate::frames::{Header, RECEIVE, connect, frame, offer, send, send_on, take, tcp};
use crate::host::{
    Host, PACKET_HEADER_BYTES, TAP, TAP_FLAGS, open_tap, own_network, pass_on, serve, start,
    starting,
};

#[test]
fn the_configuration_says_what_the_arguments_said() {
    if !own_network() {
        return;
    }
    let daemon = serve(&["--mac", "52:54:00:12:34:56", "--mtu", "9000"]);
    let mut driver = connect(&daemon, 2);
    assert_eq!(driver.config(0, 6), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(driver.config(6, 2), [1, 0], "the link is up");
    assert_eq!(driver.config(10, 2), 9000_u16.to_le_bytes());
    let (mtu, mac, status) = (1 << 3, 1 << 5, 1 << 16);
    assert_eq!(driver.features() & (mtu | mac | status), mtu | mac | status);
    let (tso, merged) = (1 << 7 | 1 << 8 | 1 << 11 | 1 << 12, 1 << 15);
    assert_eq!(driver.features() & (tso | merged), tso | merged);
}

#[test]
fn an_inherited_tap_serves_as_well() {
    if !own_network() {
        return;
    }
    let tap = open_tap(TAP_FLAGS);
    let number = pass_on(&tap);
    let daemon = start(&["--tap-fd", &number]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 2);
    drop(tap);
    send(&mut driver, Header::default(), &frame(1, 60));
    assert_eq!(host.receive().1, frame(1, 60));
}

#[test]
fn a_guest_uses_as_many_queue_pairs_as_it_asked_for() {
    if !own_network() {
        return;
    }
    let daemon = serve(&["--queue-pairs", "2"]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 5);
    assert_eq!(driver.config(8, 2), [2, 0]);
    offer(&mut driver, 0, 60, 2048);
    offer(&mut driver, 2, 60, 2048);
    let flows = |driver: &mut Driver| {
        let before = [driver.in_flight(0), driver.in_flight(2)];
        let mut header = Header { gso_type: 0, ..Header::SEGMENTS }.bytes();
        header.truncate(PACKET_HEADER_BYTES);
        (0..20).for_each(|port| host.send_with(&header, &tcp(port, 100)));
        let until = std::time::Instant::now() + backend_daemon::testing::DEADLINE;
        loop {
            let now = [driver.in_flight(0), driver.in_flight(2)];
            let taken = [before[0] - now[0], before[1] - now[1]];
            if taken[0] + taken[1] == 20 {
                return taken;
            }
            assert!(std::time::Instant::now() < until, "frames are lost: {taken:?} of 20 came");
            std::thread::yield_now();
        }
    };
    assert_eq!(flows(&mut driver), [20, 0], "only the first pair is in use at the start");
    let set_pairs = |driver: &mut Driver, count: u8| {
        driver.request(4, &[Buffer::Out(&[4, 0]), Buffer::Out(&[count, 0]), Buffer::In(1)])
    };
    assert_eq!(set_pairs(&mut driver, 3), [1], "there are only two");
    assert_eq!(set_pairs(&mut driver, 2), [0]);
    // The second worker follows when it is woken; a frame on its own queue shows that it has.
    send_on(&mut driver, 3, Header::default(), &frame(9, 60));
    assert_eq!(host.receive().1, frame(9, 60));
    let taken = flows(&mut driver);
    assert!(taken[0] > 0 && taken[1] > 0, "{taken:?}");
    assert_eq!(set_pairs(&mut driver, 1), [0]);
}

#[test]
fn a_frame_on_a_pair_that_was_not_asked_for_goes_out_too() {
    if !own_network() {
        return;
    }
    let daemon = serve(&["--queue-pairs", "3"]);
    let host = Host::listen();
    let mut driver = connect(&daemon, 7);
    for pair in [0_u8, 2, 1] {
        send_on(&mut driver, 2 * u16::from(pair) + 1, Header::default(), &frame(pair, 60));
        assert_eq!(host.receive().1, frame(pair, 60));
    }
}

#[test]
fn a_driver_without_mq_finds_the_control_queue_behind_its_one_pair() {
    if !own_network() {
        return;
    }
    let daemon = serve(&["--queue-pairs", "2"]);
    let host = Host::listen();
    let mq = 1 << 22;
    let options = Options { queues: 3, features: !mq, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let set_pairs = [Buffer::Out(&[4, 0]), Buffer::Out(&[1, 0]), Buffer::In(1)];
    assert_eq!(driver.request(2, &set_pairs), [1], "an answer, if only that it is unknown");
    send(&mut driver, Header::default(), &frame(1, 60));
    assert_eq!(host.receive().1, frame(1, 60));
    let mut buffers = offer(&mut driver, RECEIVE, 1, 2048);
    host.send(&frame(2, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(2, 60));
}

#[test]
fn a_guest_that_floods_the_control_queue_can_be_stopped() {
    if !own_network() {
        return;
    }
    let daemon = serve(&["--queue-pairs", "2"]);
    let options = Options { queues: 5, indirect: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    driver.flood(4, &[Buffer::Out(&[4, 0, 9, 0]), Buffer::In(1)]);
    driver.stop_queue(4);
}

/// Runs the program until it ends by itself; gives its exit code and its standard error.
fn run(args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre-net"));
    let folder = std::env::temp_dir().join(format!("nacre-net-start-{}", std::process::id()));
    command.args(["--log-level", "error", "--socket-path"]).arg(folder).args(args);
    let _starting = starting();
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn what_is_no_tap_is_said_in_one_line_with_an_exit_code_of_its_own() {
    if !own_network() {
        return;
    }
    let held = open_tap(TAP_FLAGS);
    for args in [&["--tap", TAP][..], &["--tap", "lo"], &["--tap-fd", "1000"]] {
        let (code, said) = run(args);
        assert_eq!((code, said.lines().count()), (Some(3), 1), "{args:?}: {said}");
    }
    let plain = {
        let _starting = starting();
        drop(held);
        open_tap(libc::IFF_TAP | libc::IFF_NO_PI)
    };
    let (code, said) = run(&["--tap-fd", &pass_on(&plain)]);
    assert_eq!(code, Some(3));
    assert!(said.contains("IFF_VNET_HDR"), "{said}");
    assert_eq!(run(&["--tap-fd", "7", "--queue-pairs", "2"]).0, Some(2));
    assert_eq!(run(&[]).0, Some(2));
}

#[test]
fn a_tap_that_vanishes_ends_the_process() {
    if !own_network() {
        return;
    }
    let mut daemon = serve(&[]);
    let _host = Host::listen();
    let mut driver = connect(&daemon, 2);
    // Without buffers nobody looks at the tap, and its end shows with the next kick.
    offer(&mut driver, RECEIVE, 1, 2048);
    let _starting = starting();
    let deleted = Command::new("ip").args(["link", "delete", TAP]).status();
    if !deleted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: there is no ip(8) to delete an interface with");
        return;
    }
    assert_eq!(daemon.wait().code(), Some(5));
    assert!(daemon.log().contains("the tap"), "{}", daemon.log());
}
