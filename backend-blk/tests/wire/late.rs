//! A write that outlives the process that made it.

use std::ffi::OsStr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use backend_daemon::testing::{Buffer, DEADLINE, Daemon, Driver, Options};
use rustix::process::Signal;

use super::slow_disk::SlowDisk;
use super::{OK, OUT, header, pattern, read, write};

const BLOCK_BYTES: usize = 4096;

fn start(disk: &Path, extra: &[&str]) -> Daemon {
    let mut args = vec![OsStr::new("--disk"), disk.as_os_str(), OsStr::new("--direct")];
    args.extend(extra.iter().map(OsStr::new));
    Daemon::start(env!("CARGO_BIN_EXE_nacre-blk"), &args)
}

/// Waits until the daemon has said something.
fn wait_for_log(daemon: &Daemon, words: &str) {
    let deadline = Instant::now() + DEADLINE;
    while !daemon.log().contains(words) {
        assert!(Instant::now() < deadline, "{words:?} is not in {:?}", daemon.log());
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_successor_serves_only_when_the_last_write_of_its_predecessor_has_reached_the_disk() {
    let Some(disk) = SlowDisk::mount(1 << 20) else { return };
    let mut killed = start(&disk.path(), &[]);
    let options = Options { inflight: true, ..Options::default() };
    let mut driver = Driver::connect(&killed.socket(), &options);
    if killed.log().contains("no io_uring") {
        eprintln!("SKIPPED: without io_uring no write outlives its process");
        return;
    }
    assert_eq!(write(&mut driver, 0, 0, &pattern(1, BLOCK_BYTES)), OK);

    disk.hold();
    let (head, data) = (header(OUT, 0), pattern(2, BLOCK_BYTES));
    let buffers = [Buffer::Out(&head), Buffer::Out(&data), Buffer::In(1)];
    let request = driver.submit(0, &buffers);
    disk.wait_for_held();
    killed.signal(Signal::KILL);
    killed.wait();

    // The process is gone and waited for; its write is still on its way.
    let mut hasty = start(&disk.path(), &[]);
    assert_eq!(hasty.wait().code(), Some(3));
    assert!(hasty.log().contains("in use"), "{}", hasty.log());
    let mut patient = start(&disk.path(), &["--lock-wait", "60"]);
    wait_for_log(&patient, "waiting for the lock");
    let until = Instant::now() + Duration::from_millis(200);
    while Instant::now() < until {
        assert!(patient.is_running() && !patient.socket().exists(), "{}", patient.log());
        thread::yield_now();
    }
    assert_eq!(disk.bytes(0, BLOCK_BYTES), pattern(1, BLOCK_BYTES));

    disk.release();
    driver.reconnect(&patient.socket());
    assert_eq!(driver.wait(0, request).bytes, [OK]);
    assert_eq!(write(&mut driver, 0, 0, &pattern(3, BLOCK_BYTES)), OK);
    let block = u32::try_from(BLOCK_BYTES).unwrap();
    assert_eq!(read(&mut driver, 0, 0, block), (pattern(3, BLOCK_BYTES), OK));
    assert_eq!(disk.bytes(0, BLOCK_BYTES), pattern(3, BLOCK_BYTES));
}

#[test]
fn a_write_from_memory_that_goes_meanwhile_ends_and_harms_nobody() {
    let Some(disk) = SlowDisk::mount(1 << 20) else { return };
    let mut daemon = start(&disk.path(), &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    if daemon.log().contains("no io_uring") {
        eprintln!("SKIPPED: without io_uring a write holds the protocol up");
        return;
    }
    let region = driver.add_memory(1 << 20);
    disk.hold();
    let (head, data) = (header(OUT, 0), pattern(1, BLOCK_BYTES));
    let request = driver.submit(0, &[Buffer::Out(&head), Buffer::Out(&data), Buffer::In(1)]);
    disk.wait_for_held();
    driver.remove_memory_in_use(region);
    disk.release();
    assert_eq!(driver.wait(0, request).bytes, [OK]);
    driver.forget_memory(region);
    assert_eq!(disk.bytes(0, BLOCK_BYTES), data);
    let block = u32::try_from(BLOCK_BYTES).unwrap();
    assert_eq!(read(&mut driver, 0, 0, block), (data, OK));
    assert!(daemon.is_running());
}
