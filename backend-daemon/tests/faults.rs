//! What becomes of a backend whose device fails: it ends and says how, and never hangs silently.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod echo;

use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use backend_daemon::testing::{Buffer, Driver, Options};
use nacre_proto::exit::BackendExit;

use self::echo::{ask, start};

#[test]
fn a_host_failure_ends_the_process_with_its_own_code() {
    let mut daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(ask(&mut driver, b"hello"), b"hello");
    driver.submit(0, &[Buffer::Out(b"host"), Buffer::In(8)]);
    let code = u8::from(BackendExit::WorkerDied);
    assert_eq!(daemon.wait().code(), Some(code.into()), "{}", daemon.log());
    assert!(daemon.log().contains("cannot go on: as was asked"), "{}", daemon.log());
    assert!(!daemon.socket().exists());
}

#[test]
fn a_panic_ends_the_process_with_its_own_code() {
    let mut daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.submit(0, &[Buffer::Out(b"panic"), Buffer::In(8)]);
    let code = u8::from(BackendExit::WorkerDied);
    assert_eq!(daemon.wait().code(), Some(code.into()), "{}", daemon.log());
    assert!(daemon.log().contains("as was asked"), "{}", daemon.log());
}

#[test]
fn the_jail_lets_a_process_abort() {
    let mut daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.submit(0, &[Buffer::Out(b"abort"), Buffer::In(8)]);
    assert_eq!(daemon.wait().signal(), Some(6), "SIGABRT expected; {}", daemon.log());
}

#[test]
fn opening_a_file_ends_the_process_at_once() {
    let mut daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.submit(0, &[Buffer::Out(b"open"), Buffer::In(8)]);
    assert_eq!(daemon.wait().signal(), Some(31), "SIGSYS expected; {}", daemon.log());
}

#[test]
fn an_answer_that_does_not_fit_stops_the_queue_and_no_other() {
    let mut daemon = start();
    let options = Options { queues: 2, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let request = driver.submit(0, &[Buffer::Out(b"too long"), Buffer::In(2)]);
    assert!(driver.wait_for_error(0));
    assert_eq!(driver.request(1, &[Buffer::Out(b"fine"), Buffer::In(4)]), b"fine");
    assert_eq!(driver.wait_for(0, request, Duration::from_millis(50)), None);
    driver.reset();
    assert_eq!(ask(&mut driver, b"again"), b"again");
    assert!(daemon.is_running());
}

#[test]
fn the_configuration_is_written_within_its_bounds_only() {
    let daemon = start();
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert!(driver.write_config(2, b"abc"));
    assert_eq!(driver.config(0, 8), b"\0\0abc\0\0\0");
    assert_eq!(driver.config(4, 8), b"c\0\0\0\0\0\0\0", "zeroes behind the end");
    assert!(!driver.write_config(6, b"abc"));
    let mut next = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(next.config(0, 8), b"\0\0abc\0\0\0");
}

#[test]
fn the_worker_learns_what_was_negotiated() {
    let daemon = start();
    let options = Options { event_idx: false, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let bytes = driver.request(0, &[Buffer::Out(b"features"), Buffer::In(8)]);
    assert_eq!(bytes, driver.features().to_le_bytes());
    assert_eq!(driver.features() & 1 << 29, 0);
}
