//! Whatever a frontend sends, the daemon lives on and serves the next one.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod echo;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;

use backend_daemon::testing::{Driver, Enabling, Options, connect_soon};
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

const SET_FEATURES: u32 = 2;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
/// Requests that set memory and rings up, and take them down.
const SET_UP: [u32; 13] = [5, 8, 9, 10, 11, 12, 13, 14, 18, 31, 32, 37, 38];
const LAST_REQUEST: u32 = 46;
const NEED_REPLY: u32 = 1 << 3;

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = request.to_le_bytes().to_vec();
    bytes.extend((1 | NEED_REPLY).to_le_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// A generator that gives the same bytes in every run (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Bytes of a plausible message: most often of the request's own length, with words that are
    /// small as often as they are wild.
    fn payload(&mut self, request: u32) -> Vec<u8> {
        let own = match request {
            // A memory table of one region, addresses, a region.
            5 | 9 | 37 | 38 => 5,
            // A log of written pages.
            6 => 2,
            // An inflight region.
            31 | 32 => 3,
            1 | 3 | 4 | 15 | 17 | 34 | 36 | 43 => 0,
            _ => 1,
        };
        let words = if self.next().is_multiple_of(4) { self.next() % 9 } else { own };
        let word = |random: &mut Self| match random.next() % 4 {
            0 => 0,
            1 => (random.next() % 4) | ((random.next() % 3) << 32),
            2 => (random.next() % 0x100) << 12,
            _ => random.next(),
        };
        let mut payload: Vec<u8> = (0..words).flat_map(|_word| word(self).to_le_bytes()).collect();
        if request == 5 && words == 5 {
            payload[..8].copy_from_slice(&1_u64.to_le_bytes());
        }
        payload
    }
}

/// Negotiates, so that no message is refused only for coming too early.
fn negotiate(stream: &mut UnixStream) {
    let protocol: u64 =
        1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16 | 1 << 19;
    for (request, features) in [(SET_PROTOCOL_FEATURES, protocol), (SET_FEATURES, 1 << 30)] {
        stream.write_all(&message(request, &features.to_le_bytes())).unwrap();
    }
}

#[test]
fn rings_that_were_enabled_before_the_features_run_when_they_are_set_up() {
    let daemon = echo::start();
    for answered in [false, true] {
        let enabling = Enabling::First { answered };
        let options = Options { queues: 2, enabling, ..Options::default() };
        let mut driver = Driver::connect(&daemon.socket(), &options);
        assert_eq!(echo::ask(&mut driver, b"early"), b"early");
        let base = driver.stop_queue(0);
        driver.start_queue(0, base);
        assert_eq!(echo::ask(&mut driver, b"again"), b"again");
    }
}

#[test]
fn a_ring_that_does_not_exist_cannot_be_enabled_early() {
    let mut daemon = echo::start();
    let mut stream = connect_soon(&daemon.socket());
    let ring_and_state = [2_u32, 1].map(u32::to_le_bytes);
    stream.write_all(&message(SET_VRING_ENABLE, ring_and_state.as_flattened())).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the daemon hangs up");
    assert!(daemon.log().contains("there is no queue 2"), "{}", daemon.log());
    assert!(daemon.is_running());
}

#[test]
fn a_status_is_kept_and_zero_resets_the_device() {
    let daemon = echo::start();
    let options = Options { inflight: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    assert_eq!(driver.status(), 0);
    driver.set_status(15);
    assert_eq!(driver.status(), 15);
    assert_eq!(echo::ask(&mut driver, b"hello"), b"hello");
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    let entries = |driver: &Driver| driver.inflight_region()[8..].to_vec();
    assert!(entries(&driver)[..2] == [0, 0], "the region is as good as new");
    driver.begin_anew();
    driver.set_status(15);
    assert_eq!(echo::ask(&mut driver, b"again"), b"again");
    // A frontend that hangs up takes the status with it.
    drop(driver);
    let mut next = Driver::connect(&daemon.socket(), &options);
    assert_eq!(next.status(), 0);
    assert_eq!(echo::ask(&mut next, b"next"), b"next");
}

#[test]
fn a_state_is_handed_over_whole_while_no_ring_runs() {
    let daemon = echo::start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert!(driver.write_config(0, b"a device"));
    assert_eq!(driver.save_state(), None, "a ring runs");
    drop(driver);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let base = driver.stop_queue(0);
    let state = driver.save_state().unwrap();
    assert_eq!(state.len(), 8 << 16);
    assert!(driver.write_config(0, b"changed!"));
    assert!(driver.load_state(&state));
    assert_eq!(driver.config(0, 8), b"a device");
    driver.start_queue(0, base);
    assert_eq!(echo::ask(&mut driver, b"still"), b"still");
    driver.stop_queue(0);
    assert!(!driver.load_state(b"something else"));
}

#[test]
fn no_message_ends_the_process() {
    let mut daemon = echo::start();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let memory = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(1 << 20).unwrap();
    let event = EventFd::new(0).unwrap();
    for round in 0..100 * LAST_REQUEST {
        let mut stream = connect_soon(&daemon.socket());
        negotiate(&mut stream);
        for _message in 0..6 {
            let request = match random.next() % 3 {
                0 => 1 + u32::try_from(random.next()).unwrap_or(round) % LAST_REQUEST,
                _ => SET_UP[usize::try_from(random.next()).unwrap() % SET_UP.len()],
            };
            let bytes = message(request, &random.payload(request));
            let fds: [RawFd; 2] = [memory.as_raw_fd(), event.as_raw_fd()];
            let fds = match request {
                5 | 6 | 32 | 37 => &fds[..1],
                12..=14 => &fds[1..],
                _ => &fds[..usize::from(random.next().is_multiple_of(8))],
            };
            // The daemon hangs up at the first message that it refuses.
            if stream.send_with_fds(&[&bytes[..]], fds).is_err() {
                break;
            }
        }
        let mut replies = Vec::new();
        match stream.shutdown(Shutdown::Write).and_then(|()| stream.read_to_end(&mut replies)) {
            Ok(_) | Err(_) => {}
        }
    }
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(echo::ask(&mut driver, b"still there"), b"still there");
    assert!(daemon.is_running());
}
