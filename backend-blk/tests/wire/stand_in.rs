//! In the place of a disk that is gone: what a killed process left in flight fails, and all that
//! comes, and nothing hangs.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Mutex;

use backend_daemon::testing::{Buffer, Daemon, Driver, Options, Request};
use nacre_proto::store::FromStore;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::process::Signal;
use tempfile::NamedTempFile;

use super::{DISK_BYTES, FLUSH, IOERR, OK, OUT, header, image, pattern, read, simple, write};

const DEPTH: u64 = 32;
/// Every kill finds something in flight, or nearly.
const MOST_KILLS: u32 = 50;

/// Held while descriptors are open for a program that is started.
static STARTING: Mutex<()> = Mutex::new(());

fn state() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let state = File::from(memfd_create("state", flags).unwrap());
    state.set_len(4096).unwrap();
    fcntl_add_seals(&state, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    state
}

/// Starts a process, and gives the other end of its store.
fn start(state: &File, disk: &str, extra: &[&str]) -> (Daemon, OwnedFd) {
    let kind = SocketType::SEQPACKET;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    send(&ours, &FromStore::End.encode(), SendFlags::empty()).unwrap();
    let (state_fd, store_fd) = (state.as_raw_fd().to_string(), theirs.as_raw_fd().to_string());
    let args = ["--disk", disk, "--state-fd", &state_fd, "--store-fd", &store_fd];
    let args: Vec<_> = args.iter().chain(extra).map(AsRef::as_ref).collect();
    let _starting = STARTING.lock().unwrap();
    fcntl_setfd(state.as_fd(), FdFlags::empty()).unwrap();
    fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
    let daemon = Daemon::start(env!("CARGO_BIN_EXE_nacre-blk"), &args);
    fcntl_setfd(state.as_fd(), FdFlags::CLOEXEC).unwrap();
    (daemon, ours)
}

fn submit(driver: &mut Driver, block: u64) -> Request {
    let (head, data) = (header(OUT, block * 8), pattern(block, 4096));
    driver.submit(0, &[Buffer::Out(&head), Buffer::Out(&data), Buffer::In(1)])
}

fn marked(driver: &Driver) -> usize {
    driver.inflight_region()[16..].chunks_exact(16).filter(|entry| entry[0] != 0).count()
}

/// A driver whose backend was killed with something in flight, and its requests.
fn killed_in_midst(state: &File, disk: &NamedTempFile) -> (Driver, Vec<Request>) {
    let path = disk.path().display().to_string();
    let (mut daemon, _store) = start(state, &path, &["--direct"]);
    let options = Options { inflight: true, queue_size: 128, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let mut kills = 0;
    loop {
        let requests: Vec<_> = (0..DEPTH).map(|block| submit(&mut driver, block)).collect();
        daemon.signal(Signal::KILL);
        daemon.wait();
        if marked(&driver) > 0 {
            return (driver, requests);
        }
        kills += 1;
        assert!(kills < MOST_KILLS, "nothing was in flight at any kill");
        (daemon, _) = start(state, &path, &["--direct"]);
        driver.reconnect(&daemon.socket());
        for request in requests {
            assert_eq!(driver.wait(0, request).bytes, [OK]);
        }
    }
}

#[test]
fn every_request_in_flight_and_every_new_one_fails_exactly_once() {
    let (disk, state) = (image(), state());
    let path = disk.path().display().to_string();
    let (mut driver, requests) = killed_in_midst(&state, &disk);
    fs::remove_file(disk.path()).unwrap();

    let (mut daemon, _store) = start(&state, &path, &["--direct"]);
    assert_eq!(daemon.wait().code(), Some(3), "the disk is gone: {}", daemon.log());
    let (daemon, _store) = start(&state, &path, &["--direct", "--stand-in"]);
    driver.reconnect(&daemon.socket());
    let mut failed = 0;
    for request in requests {
        // Some were answered before the end; that none is answered twice, the driver sees to.
        match driver.wait(0, request).bytes[..] {
            [OK] => {}
            [IOERR] => failed += 1,
            ref other => panic!("{other:?}"),
        }
    }
    assert!(failed > 0);
    assert_eq!((driver.in_flight(0), marked(&driver)), (0, 0));
    assert_eq!(write(&mut driver, 0, 0, &pattern(1, 512)), IOERR);
    assert_eq!(read(&mut driver, 0, 0, 512).1, IOERR);
    assert_eq!(simple(&mut driver, FLUSH, &[]), IOERR);
    assert!(daemon.log().contains("every request fails"), "{}", daemon.log());
}

#[test]
fn a_stand_in_looks_like_the_disk_whose_place_it_takes() {
    let (disk, state) = (image(), state());
    let path = disk.path().display().to_string();
    let options = Options { inflight: true, ..Options::default() };
    let extra = ["--num-queues", "2", "--serial", "it"];
    let (mut real, _store) = start(&state, &path, &extra);
    let mut driver = Driver::connect(&real.socket(), &options);
    let known = (driver.features(), driver.config(0, 60));
    drop(driver);
    real.terminate();
    let (fake, _store) = start(&state, &path, &[&extra[..], &["--stand-in"]].concat());
    let mut driver = Driver::connect(&fake.socket(), &options);
    assert_eq!((driver.features(), driver.config(0, 60)), known);
}

#[test]
fn a_stand_in_without_a_predecessor_is_refused() {
    let disk = image();
    let (mut daemon, _store) = start(&state(), &disk.path().display().to_string(), &["--stand-in"]);
    assert_eq!(daemon.wait().code(), Some(6), "{}", daemon.log());
    assert!(daemon.log().contains("no predecessor"), "{}", daemon.log());
}

#[test]
fn a_successor_shows_the_disk_as_the_guest_knows_it_until_it_is_told_that_it_grew() {
    let (state, disk) = (state(), image());
    let path = disk.path().display().to_string();
    let (mut daemon, _store) = start(&state, &path, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let sectors = |bytes: u64| (bytes / 512).to_le_bytes();
    disk.as_file().set_len(2 * DISK_BYTES).unwrap();
    daemon.signal(Signal::KILL);
    daemon.wait();
    let (mut daemon, _store) = start(&state, &path, &[]);
    driver.reconnect(&daemon.socket());
    assert_eq!(driver.config(0, 8), sectors(DISK_BYTES));
    daemon.signal(Signal::HUP);
    driver.hear_of_configuration();
    assert_eq!(driver.config(0, 8), sectors(2 * DISK_BYTES));
    daemon.signal(Signal::KILL);
    daemon.wait();
    let (daemon, _store) = start(&state, &path, &[]);
    driver.reconnect(&daemon.socket());
    assert_eq!(driver.config(0, 8), sectors(2 * DISK_BYTES));
}
