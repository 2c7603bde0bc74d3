//! Whatever a frontend sends, the daemon lives on and serves the next one.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod echo;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;

use backend_daemon::testing::{Driver, Options, connect_soon};
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

const SET_FEATURES: u32 = 2;
const SET_PROTOCOL_FEATURES: u32 = 16;
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

    /// Bytes of a plausible message: words that are small as often as they are wild.
    fn payload(&mut self) -> Vec<u8> {
        let words = self.next() % 9;
        (0..words)
            .flat_map(|_word| {
                match self.next() % 4 {
                    0 => 0,
                    1 => self.next() % 4,
                    2 => self.next() % 0x10_0000,
                    _ => self.next(),
                }
                .to_le_bytes()
            })
            .collect()
    }
}

/// Negotiates, so that no message is refused only for coming too early.
fn negotiate(stream: &mut UnixStream) {
    let protocol: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15;
    for (request, features) in [(SET_PROTOCOL_FEATURES, protocol), (SET_FEATURES, 1 << 30)] {
        stream.write_all(&message(request, &features.to_le_bytes())).unwrap();
    }
}

#[test]
fn no_message_ends_the_process() {
    let mut daemon = echo::start();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let memory = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(1 << 20).unwrap();
    let event = EventFd::new(0).unwrap();
    for round in 0..40 * LAST_REQUEST {
        let mut stream = connect_soon(&daemon.socket());
        negotiate(&mut stream);
        for _message in 0..4 {
            let bytes = message(1 + round % LAST_REQUEST, &random.payload());
            let fds: [RawFd; 2] = [memory.as_raw_fd(), event.as_raw_fd()];
            let fds = &fds[..usize::try_from(random.next() % 3).unwrap()];
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
