//! Killed again and again while frames flow: none goes out twice, few are lost, no ring is stuck.

use std::env;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use backend_daemon::testing::{Buffer, DEADLINE, Daemon, Driver, Options, Request, connect_soon};
use rustix::process::Signal;

use crate::frames::{HEADER_BYTES, Header, RECEIVE, TRANSMIT, frame, offer};
use crate::host::{Host, PACKET_HEADER_BYTES, own_network};
use crate::supervised::Supervisor;

/// Bytes of a frame before its number.
const NUMBER_AT: usize = 14;
/// The host's queues hold more frames than these.
const MOST_AHEAD: u32 = 200;

/// How often a process is killed; `NACRE_TORTURE_KILLS` makes it longer, and `NACRE_TORTURE_STEPS`
/// the walk through every step.
fn kills() -> u32 {
    env::var("NACRE_TORTURE_KILLS").map_or(100, |kills| kills.parse().unwrap())
}

fn numbered(number: u32) -> Vec<u8> {
    let mut frame = frame(0, 60);
    frame[NUMBER_AT..NUMBER_AT + 4].copy_from_slice(&number.to_le_bytes());
    frame
}

fn number(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[NUMBER_AT..NUMBER_AT + 4].try_into().unwrap())
}

/// Frames as they arrive.
#[derive(Default)]
struct Arrived {
    next: u32,
    lost: u32,
}

impl Arrived {
    fn add(&mut self, number: u32) {
        assert!(number >= self.next, "{number} came twice or late, {} was next", self.next);
        self.lost += number - self.next;
        self.next = number + 1;
    }
}

/// A frontend that keeps a region for what is in flight.
fn tracked() -> Options {
    Options { inflight: true, ..Options::default() }
}

/// A guest in whose midst the device's process is replaced.
struct Storm {
    supervisor: Supervisor,
    daemon: Daemon,
    host: Host,
    driver: Driver,
    dice: u64,
}

impl Storm {
    fn new(options: Options) -> Self {
        let mut supervisor = Supervisor::new(1);
        let daemon = supervisor.start();
        let host = Host::listen();
        let options = Options { queues: 2, queue_size: 256, ..options };
        let driver = Driver::connect(&daemon.socket(), &options);
        Self { supervisor, daemon, host, driver, dice: 1 }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice =
            self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.dice >> 33) % sides
    }

    /// Has the process killed at some moment while `work` is done over and over.
    fn kill_during(&mut self, mut work: impl FnMut(&mut Driver, &Host)) {
        let delay = Duration::from_micros(self.roll(3000));
        self.daemon.kill_during(delay, |over| {
            while !over.load(Ordering::Acquire) {
                work(&mut self.driver, &self.host);
            }
        });
    }

    /// Does the work until it is done.
    fn finish(&mut self, mut is_done: impl FnMut(&mut Driver, &Host) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_done(&mut self.driver, &self.host) {
            assert!(Instant::now() < deadline, "a ring is stuck");
        }
    }

    fn replace(&mut self) {
        self.supervisor.restart(&mut self.daemon);
        self.driver.reconnect(&self.daemon.socket());
    }
}

fn hear(host: &Host, arrived: &mut Arrived) {
    while host.wait(Duration::ZERO) {
        arrived.add(number(&host.receive().1));
    }
}

fn transmit_through_kills(options: Options) {
    let mut storm = Storm::new(options);
    let (mut sent, mut arrived) = (0, Arrived::default());
    for _kill in 0..kills() {
        storm.kill_during(|driver, host| {
            let header = Header::default().bytes();
            // A frame takes two descriptors at most.
            if driver.in_flight(TRANSMIT) < 100 {
                driver.submit(TRANSMIT, &[Buffer::Out(&header), Buffer::Out(&numbered(sent))]);
                sent += 1;
            }
            hear(host, &mut arrived);
        });
        storm.replace();
    }
    storm.finish(|driver, _host| driver.in_flight(TRANSMIT) == 0);
    hear(&storm.host, &mut arrived);
    arrived.add(sent);
    assert!(arrived.lost <= kills(), "{} lost of {sent} in {} kills", arrived.lost, kills());
    assert!(sent > kills());
}

#[test]
fn a_frame_goes_out_once_and_each_kill_loses_one_at_most() {
    if own_network() {
        transmit_through_kills(tracked());
    }
}

#[test]
fn a_frame_goes_out_once_without_the_ring_s_features_too() {
    if own_network() {
        let options = Options { event_idx: false, indirect: true, ..tracked() };
        transmit_through_kills(options);
    }
}

#[test]
fn a_frame_goes_out_once_without_a_region_for_what_is_in_flight_too() {
    if own_network() {
        transmit_through_kills(Options::default());
    }
}

/// Takes what has come, in the order of the buffers, and offers as many new ones.
fn take_arrived(driver: &mut Driver, buffers: &mut Vec<Request>, arrived: &mut Arrived) {
    while let Some(answer) = driver.wait_for(RECEIVE, buffers[0], Duration::ZERO) {
        buffers.remove(0);
        buffers.extend(offer(driver, RECEIVE, 1, 2048));
        assert_eq!(answer.bytes[10..HEADER_BYTES], [1, 0]);
        arrived.add(number(&answer.bytes[HEADER_BYTES..answer.written_bytes as usize]));
    }
}

#[test]
fn a_frame_to_the_guest_comes_once_and_each_kill_loses_one_at_most() {
    if !own_network() {
        return;
    }
    let mut storm = Storm::new(tracked());
    let mut buffers = offer(&mut storm.driver, RECEIVE, 64, 2048);
    let (mut sent, mut arrived) = (0, Arrived::default());
    for _kill in 0..kills() {
        storm.kill_during(|driver, host| {
            if sent - arrived.next < MOST_AHEAD {
                host.send_with(&[0; PACKET_HEADER_BYTES], &numbered(sent));
                sent += 1;
            }
            take_arrived(driver, &mut buffers, &mut arrived);
        });
        storm.replace();
        // Nobody kicks, and the ring is served.
        let before = arrived.next;
        host_sends_one(&storm.host, &mut sent);
        storm.finish(|driver, _host| {
            take_arrived(driver, &mut buffers, &mut arrived);
            arrived.next > before
        });
    }
    host_sends_one(&storm.host, &mut sent);
    storm.finish(|driver, _host| {
        take_arrived(driver, &mut buffers, &mut arrived);
        arrived.next == sent
    });
    assert!(arrived.lost <= kills(), "{} lost of {sent} in {} kills", arrived.lost, kills());
    assert!(sent > kills());
}

fn host_sends_one(host: &Host, sent: &mut u32) {
    host.send(&numbered(*sent));
    *sent += 1;
}

#[test]
fn a_death_at_any_step_sends_nothing_twice_and_loses_one_frame_at_most() {
    if !own_network() {
        return;
    }
    let steps = env::var("NACRE_TORTURE_STEPS").map_or(200, |steps| steps.parse().unwrap());
    let mut storm = Storm::new(tracked());
    let mut buffers = offer(&mut storm.driver, RECEIVE, 64, 2048);
    let (mut sent, mut arrived) = (0, Arrived::default());
    let (mut sent_to_guest, mut arrived_at_guest) = (0, Arrived::default());
    let mut work = |driver: &mut Driver, host: &Host| {
        let header = Header::default().bytes();
        if driver.in_flight(TRANSMIT) < 100 {
            driver.submit(TRANSMIT, &[Buffer::Out(&header), Buffer::Out(&numbered(sent))]);
            sent += 1;
        }
        if sent_to_guest - arrived_at_guest.next < MOST_AHEAD {
            host_sends_one(host, &mut sent_to_guest);
        }
        hear(host, &mut arrived);
        take_arrived(driver, &mut buffers, &mut arrived_at_guest);
        [arrived.lost, arrived_at_guest.lost]
    };
    storm.daemon.signal(Signal::KILL);
    storm.daemon.wait();
    for step in 1..=steps {
        storm.daemon = storm.supervisor.start_doomed(Some(step));
        let stream = connect_soon(&storm.daemon.socket());
        if storm.driver.reconnects(stream) {
            let deadline = Instant::now() + DEADLINE;
            while storm.daemon.is_running() {
                assert!(Instant::now() < deadline, "step {step} never comes");
                work(&mut storm.driver, &storm.host);
            }
        }
        storm.daemon.wait();
        let log = storm.daemon.log();
        assert!(log.contains("fault: dies at "), "step {step}: it died of itself: {log}");
        let lost = work(&mut storm.driver, &storm.host);
        assert!(lost.iter().all(|lost| *lost <= step), "{lost:?} lost in {step} deaths");
    }
    storm.daemon = storm.supervisor.start();
    storm.driver.reconnect(&storm.daemon.socket());
    storm.finish(|driver, _host| driver.in_flight(TRANSMIT) == 0);
}
