//! A successor of a process that was killed.

use std::time::{Duration, Instant};

use backend_daemon::testing::{Buffer, DEADLINE, Driver, Options};
use rustix::process::Signal;

use crate::frames::{Header, TRANSMIT, connect, frame, offer, send, take, tcp};
use crate::host::{Host, PACKET_HEADER_BYTES, make_persistent, own_network, serve};
use crate::supervised::Supervisor;

/// Long enough for a frame that must not come.
const NOTHING: Duration = Duration::from_millis(100);

#[test]
fn a_frame_that_may_have_gone_out_is_not_sent_again_and_no_ring_is_stuck() {
    if !own_network() {
        return;
    }
    make_persistent();
    let mut daemon = serve(&[]);
    let host = Host::listen();
    let options = Options { queues: 2, inflight: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let mut buffers = offer(&mut driver, 0, 8, 2048);
    send(&mut driver, Header::default(), &frame(1, 60));
    assert_eq!(host.receive().1, frame(1, 60));

    // One frame was taken and perhaps sent, another one not looked at, when the process died.
    daemon.signal(Signal::KILL);
    daemon.wait();
    let header = Header::default().bytes();
    let offer_frame = |driver: &mut Driver, number| {
        driver.offer(TRANSMIT, &[Buffer::Out(&header), Buffer::Out(&frame(number, 60))])
    };
    let taken = offer_frame(&mut driver, 2);
    driver.mark_in_flight(TRANSMIT, taken);
    let new = offer_frame(&mut driver, 3);
    daemon = serve(&[]);
    driver.reconnect(&daemon.socket());
    driver.wait(TRANSMIT, taken);
    driver.wait(TRANSMIT, new);
    assert_eq!(host.receive().1, frame(3, 60));
    assert!(!host.wait(NOTHING));
    host.send(&frame(4, 60));
    assert_eq!(take(&mut driver, &mut buffers).1, frame(4, 60));
}

/// Sends frames of twenty connections; gives how many come on each of two pairs.
fn spread(host: &Host, driver: &mut Driver) -> [usize; 2] {
    let in_flight = |driver: &mut Driver| [driver.in_flight(0), driver.in_flight(2)];
    let before = in_flight(driver);
    let mut header = Header { gso_type: 0, ..Header::SEGMENTS }.bytes();
    header.truncate(PACKET_HEADER_BYTES);
    (0..20).for_each(|port| host.send_with(&header, &tcp(port, 100)));
    let until = Instant::now() + DEADLINE;
    loop {
        let now = in_flight(driver);
        let came = [before[0] - now[0], before[1] - now[1]];
        if came[0] + came[1] == 20 {
            return came;
        }
        assert!(Instant::now() < until, "frames are lost: {came:?} of 20 came");
        std::thread::yield_now();
    }
}

#[test]
fn a_successor_uses_as_many_queue_pairs_as_the_guest_had_asked_for() {
    if !own_network() {
        return;
    }
    let mut supervisor = Supervisor::new(2);
    let mut daemon = supervisor.start();
    let host = Host::listen();
    let options = Options { queues: 5, inflight: true, queue_size: 256, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    offer(&mut driver, 0, 120, 2048);
    offer(&mut driver, 2, 120, 2048);
    assert_eq!(spread(&host, &mut driver), [20, 0]);
    supervisor.restart(&mut daemon);
    driver.reconnect(&daemon.socket());
    assert_eq!(spread(&host, &mut driver), [20, 0]);

    let two = [Buffer::Out(&[4, 0]), Buffer::Out(&[2, 0]), Buffer::In(1)];
    assert_eq!(driver.request(4, &two), [0]);
    supervisor.restart(&mut daemon);
    driver.reconnect(&daemon.socket());
    // The guest has said nothing since.
    let came = spread(&host, &mut driver);
    assert!(came[0] > 0 && came[1] > 0, "{came:?}");

    driver.reset();
    offer(&mut driver, 0, 120, 2048);
    offer(&mut driver, 2, 120, 2048);
    assert_eq!(spread(&host, &mut driver), [20, 0], "a new driver begins with one pair");
    supervisor.restart(&mut daemon);
    driver.reconnect(&daemon.socket());
    assert_eq!(spread(&host, &mut driver), [20, 0]);
}

#[test]
fn a_state_that_cannot_be_read_has_an_exit_code_of_its_own() {
    if !own_network() {
        return;
    }
    let mut supervisor = Supervisor::new(2);
    for (state, words) in [
        ([2, 0, 0, 0, 1, 0, 0, 0], "version 2"),
        ([1, 0, 0, 0, 3, 0, 0, 0], "3 of 2 queue pairs"),
        ([1, 0, 0, 0, 0, 0, 0, 0], "0 of 2 queue pairs"),
    ] {
        supervisor.write_state(&state);
        let mut daemon = supervisor.start();
        assert_eq!(daemon.wait().code(), Some(6), "{}", daemon.log());
        assert!(daemon.log().contains(words), "{}", daemon.log());
    }
}

#[test]
fn the_state_moves_to_another_process_by_way_of_the_frontend() {
    if !own_network() {
        return;
    }
    let daemon = serve(&["--queue-pairs", "2"]);
    let mut driver = connect(&daemon, 5);
    assert_eq!(driver.request(4, &[Buffer::Out(&[4, 0, 2, 0]), Buffer::In(1)]), [0]);
    let stop = |driver: &mut Driver| {
        for queue in 0..5 {
            driver.stop_queue(queue);
        }
    };
    stop(&mut driver);
    let state = driver.save_state().unwrap();
    assert_eq!(state, [1, 0, 0, 0, 2, 0]);
    drop((driver, daemon));
    let daemon = serve(&["--queue-pairs", "2"]);
    let mut driver = connect(&daemon, 5);
    stop(&mut driver);
    assert_eq!(driver.save_state().unwrap(), [1, 0, 0, 0, 1, 0]);
    assert!(driver.load_state(&state));
    assert_eq!(driver.save_state().unwrap(), state);
    for wrong in [&[1, 0, 0, 0, 3, 0][..], &[2, 0, 0, 0, 1, 0], &[1, 0, 0, 0, 1], &[]] {
        drop(driver);
        driver = connect(&daemon, 5);
        stop(&mut driver);
        assert!(!driver.load_state(wrong), "{wrong:?}");
    }
}
