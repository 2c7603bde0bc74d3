//! A successor of a process that was killed.

use std::time::Duration;

use backend_daemon::testing::{Buffer, Driver, Options};
use rustix::process::Signal;

use crate::frames::{Header, TRANSMIT, frame, offer, send, take};
use crate::host::{Host, make_persistent, own_network, serve};

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
