//! How the process starts, what it is allowed, and how it ends.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use backend_daemon::testing::{DEADLINE, Daemon, Driver, Options, connect_soon};
use rustix::process::{Signal, geteuid};
use tempfile::NamedTempFile;

use super::{DISK_BYTES, IOERR, OK, image, pattern, read, start, write};

#[test]
fn sigterm_and_sigint_end_it_cleanly_and_take_the_socket_away() {
    for signal in [Signal::TERM, Signal::INT] {
        let disk = image();
        let mut daemon = start(&disk, &[]);
        let mut driver = Driver::connect(&daemon.socket(), &Options::default());
        assert_eq!(read(&mut driver, 0, 0, 512).1, OK);
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(!daemon.socket().exists());
    }
}

#[test]
fn a_disk_that_has_grown_is_larger_for_the_guest_once_the_process_is_told() {
    for extra in [&[][..], &["--direct"]] {
        let disk = image();
        let daemon = start(&disk, extra);
        let mut driver = Driver::connect(&daemon.socket(), &Options::default());
        let sectors = |driver: &mut Driver| driver.config(0, 8);
        assert_eq!(sectors(&mut driver), (DISK_BYTES / 512).to_le_bytes());
        disk.as_file().set_len(2 * DISK_BYTES).unwrap();
        assert_eq!(write(&mut driver, 0, DISK_BYTES / 512, &pattern(1, 4096)), IOERR);
        daemon.signal(Signal::HUP);
        driver.hear_of_configuration();
        assert_eq!(sectors(&mut driver), (2 * DISK_BYTES / 512).to_le_bytes());
        assert_eq!(write(&mut driver, 0, DISK_BYTES / 512, &pattern(1, 4096)), OK);
        // A part of a block is none, and a disk never shrinks under its guest.
        for bytes in [2 * DISK_BYTES + 100, DISK_BYTES] {
            disk.as_file().set_len(bytes).unwrap();
            daemon.signal(Signal::HUP);
            assert_eq!(read(&mut driver, 0, 0, 512).1, OK);
            assert_eq!(sectors(&mut driver), (2 * DISK_BYTES / 512).to_le_bytes());
        }
        assert_eq!(read(&mut driver, 0, DISK_BYTES / 512, 4096).1, IOERR, "it is not there");
    }
}

#[test]
fn a_disk_that_grows_while_there_is_no_frontend_is_seen_by_the_next_one() {
    let disk = image();
    let daemon = start(&disk, &[]);
    drop(Driver::connect(&daemon.socket(), &Options::default()));
    disk.as_file().set_len(2 * DISK_BYTES).unwrap();
    daemon.signal(Signal::HUP);
    let deadline = Instant::now() + DEADLINE;
    let grown = (2 * DISK_BYTES / 512).to_le_bytes();
    while Driver::connect(&daemon.socket(), &Options::default()).config(0, 8) != grown {
        assert!(Instant::now() < deadline, "{}", daemon.log());
    }
}

#[test]
fn the_jail_is_closed() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(read(&mut driver, 0, 0, 512).1, OK);
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
    let mut threads = 0;
    for task in tasks {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name));
            line.unwrap().split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(field("NoNewPrivs:"), "1", "{status}");
        assert_eq!(field("Seccomp:"), "2", "{status}");
        let bounding = if geteuid().is_root() { "CapBnd:" } else { "CapEff:" };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:", bounding] {
            assert_eq!(field(set), "0000000000000000", "{status}");
        }
        threads += 1;
    }
    assert_eq!(threads, 3, "main, protocol, one worker");
}

fn fails_with(args: &[&OsStr], code: i32, words: &[&str]) {
    let mut daemon = Daemon::start(env!("CARGO_BIN_EXE_nacre-blk"), args);
    assert_eq!(daemon.wait().code(), Some(code), "{args:?}: {}", daemon.log());
    let log = daemon.log();
    assert_eq!(log.lines().count(), 1, "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is not in {log:?}");
    }
    assert!(!daemon.socket().exists());
}

#[test]
fn a_disk_that_can_t_be_had_is_one_clear_line_and_a_code_of_its_own() {
    let disk_arg = OsStr::new("--disk");
    let missing = OsStr::new("/nonexistent/disk.img");
    fails_with(&[disk_arg, missing], 3, &["/nonexistent/disk.img", "No such file"]);
    let odd = NamedTempFile::new().unwrap();
    odd.as_file().set_len(1000).unwrap();
    fails_with(&[disk_arg, odd.path().as_os_str()], 3, &["1000 bytes", "512"]);
    let empty = NamedTempFile::new().unwrap();
    fails_with(&[disk_arg, empty.path().as_os_str()], 3, &["0 bytes"]);
    fails_with(&[OsStr::new("--disk-fd"), OsStr::new("77")], 3, &["descriptor 77"]);
}

#[test]
fn a_disk_in_use_is_refused_and_its_holder_named() {
    let disk = image();
    let daemon = start(&disk, &[]);
    connect_soon(&daemon.socket());
    let args = [OsStr::new("--disk"), disk.path().as_os_str()];
    fails_with(&args, 3, &["in use by"]);
}

#[test]
fn arguments_that_make_no_sense_are_a_usage_error() {
    let disk = image();
    let mut daemon = start(&disk, &["--queue-size", "100"]);
    assert_eq!(daemon.wait().code(), Some(2));
}

#[test]
fn the_capabilities_are_printed_as_json() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_nacre-blk")).arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["type"], "block");
    assert!(printed["features"].as_array().unwrap().contains(&"read-only".into()));
}

/// Inherited descriptors are laid out by a shell: the standard library closes all but three.
fn start_with(socket: OwnedFd, disk: &NamedTempFile) -> (Daemon, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("ready");
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg("exec \"$0\" --fd 5 --disk-fd 6 --ready-fd 7 5<&0 0</dev/null 6<>\"$1\" 7>\"$2\"")
        .arg(env!("CARGO_BIN_EXE_nacre-blk"))
        .args([disk.path(), &ready])
        .stdin(Stdio::from(socket));
    (Daemon::spawn(command, folder), ready)
}

#[test]
fn with_a_connected_socket_it_serves_one_frontend_and_ends() {
    let disk = image();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut daemon, ready) = start_with(OwnedFd::from(theirs), &disk);
    let mut driver = Driver::adopt(ours, &Options::default());
    assert_eq!(write(&mut driver, 0, 0, &pattern(4, 512)), OK);
    assert_eq!(fs::read(&ready).unwrap(), b"ready\n");
    drop(driver);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    let mut first = [0; 512];
    File::open(disk.path()).unwrap().read_exact(&mut first).unwrap();
    assert_eq!(first, *pattern(4, 512));
}

#[test]
fn with_a_listening_socket_it_serves_one_frontend_after_the_other() {
    let disk = image();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ours.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (mut daemon, _ready) = start_with(OwnedFd::from(listener), &disk);
    for round in 0..3 {
        let mut driver = Driver::connect(&path, &Options::default());
        assert_eq!(write(&mut driver, 0, round, &pattern(round, 512)), OK);
    }
    assert_eq!(daemon.terminate().code(), Some(0));
    assert!(path.exists(), "the path is its owner's to remove");
}
