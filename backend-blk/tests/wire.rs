//! `nacre-blk` over its real socket, jailed, with a test driver in the guest's and the VMM's place.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use backend_daemon::testing::{
    Answer, Buffer, Daemon, Driver, Malformed, Options, Request, connect_soon,
};
use rustix::process::{Signal, geteuid};
use tempfile::NamedTempFile;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const DISK_BYTES: u64 = 1 << 20;

fn image() -> NamedTempFile {
    // Not in /tmp, which may be a tmpfs without some kinds of fallocate.
    let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(DISK_BYTES).unwrap();
    file
}

fn start(disk: &NamedTempFile, extra: &[&str]) -> Daemon {
    let mut args = vec![OsStr::new("--disk"), disk.path().as_os_str()];
    args.extend(extra.iter().map(OsStr::new));
    Daemon::start(env!("CARGO_BIN_EXE_nacre-blk"), &args)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn write(driver: &mut Driver, queue: u16, sector: u64, data: &[u8]) -> u8 {
    let header = header(OUT, sector);
    driver.request(queue, &[Buffer::Out(&header), Buffer::Out(data), Buffer::In(1)])[0]
}

fn read(driver: &mut Driver, queue: u16, sector: u64, len_bytes: u32) -> (Vec<u8>, u8) {
    let header = header(IN, sector);
    let buffers = [Buffer::Out(&header), Buffer::In(len_bytes), Buffer::In(1)];
    let mut bytes = driver.request(queue, &buffers);
    let status = bytes.pop().unwrap();
    (bytes, status)
}

fn simple(driver: &mut Driver, kind: u32, data: &[u8]) -> u8 {
    let header = header(kind, 0);
    driver.request(0, &[Buffer::Out(&header), Buffer::Out(data), Buffer::In(1)])[0]
}

/// Bytes that differ from sector to sector and from seed to seed.
fn pattern(seed: u64, len_bytes: usize) -> Vec<u8> {
    let word = |at: u64| (at / 8 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    (0_u64..).step_by(8).flat_map(word).take(len_bytes).collect()
}

/// With and without the ring's two features, on each engine.
fn every_way() -> impl Iterator<Item = (Options, &'static str)> {
    let ways = [(false, false), (false, true), (true, false), (true, true)];
    ways.into_iter().flat_map(|(event_idx, indirect)| {
        let options = Options { event_idx, indirect, ..Options::default() };
        [(options, "auto"), (options, "blocking")]
    })
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    for (options, engine) in every_way() {
        let disk = image();
        let daemon = start(&disk, &["--engine", engine]);
        let mut driver = Driver::connect(&daemon.socket(), &options);
        let data = pattern(1, 64 << 10);
        assert_eq!(write(&mut driver, 0, 8, &data), OK, "{options:?}");
        assert_eq!(read(&mut driver, 0, 8, 64 << 10), (data.clone(), OK), "{options:?}");
        assert_eq!(simple(&mut driver, FLUSH, &[]), OK);
        let mut on_disk = vec![0; data.len()];
        let mut file = disk.reopen().unwrap();
        file.seek(SeekFrom::Start(8 * 512)).unwrap();
        file.read_exact(&mut on_disk).unwrap();
        assert_eq!(on_disk, data);
    }
}

#[test]
fn many_requests_in_flight_are_each_answered_with_their_own_data() {
    for (options, engine) in every_way() {
        let options = Options { queue_size: 128, ..options };
        let disk = image();
        let daemon = start(&disk, &["--queue-size", "128", "--engine", engine]);
        let mut driver = Driver::connect(&daemon.socket(), &options);
        for round in 0..8 {
            let writes: Vec<Request> = (0..32)
                .map(|slot| {
                    let (header, data) = (header(OUT, slot * 8), pattern(slot + round, 4096));
                    driver.submit(0, &[Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)])
                })
                .collect();
            for request in writes {
                assert_eq!(driver.wait(0, request).bytes, [OK]);
            }
            let reads: Vec<Request> = (0..32)
                .map(|slot| {
                    let header = header(IN, slot * 8);
                    driver.submit(0, &[Buffer::Out(&header), Buffer::In(4096), Buffer::In(1)])
                })
                .collect();
            for (slot, request) in (0..32).zip(reads) {
                let mut expected = pattern(slot + round, 4096);
                expected.push(OK);
                let answer = Answer { written_bytes: 4097, bytes: expected };
                assert_eq!(driver.wait(0, request), answer, "slot {slot}");
            }
        }
    }
}

#[test]
fn more_requests_than_the_queue_holds_at_once_keep_flowing() {
    let disk = image();
    let daemon = start(&disk, &["--queue-size", "4"]);
    let options = Options { queue_size: 4, indirect: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    for slot in 0..64 {
        let header = header(IN, slot);
        let chain = [Buffer::Out(&header), Buffer::In(512), Buffer::In(1)];
        let requests = [(); 4].map(|()| driver.offer(0, &chain));
        driver.kick(0);
        for request in requests {
            assert_eq!(driver.wait(0, request).bytes.last(), Some(&OK));
        }
    }
}

#[test]
fn each_queue_serves_its_own_requests() {
    let disk = image();
    let daemon = start(&disk, &["--num-queues", "4"]);
    let options = Options { queues: 4, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    assert_eq!(driver.config(34, 2), [4, 0]);
    for queue in 0..4 {
        let data = pattern(queue.into(), 512);
        assert_eq!(write(&mut driver, queue, queue.into(), &data), OK);
    }
    for queue in 0..4 {
        let other = 3 - queue;
        let expected = (pattern(other.into(), 512), OK);
        assert_eq!(read(&mut driver, queue, other.into(), 512), expected);
    }
}

#[test]
fn reads_and_writes_past_the_end_fail_and_change_nothing() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let sectors = DISK_BYTES / 512;
    assert_eq!(driver.config(0, 8), sectors.to_le_bytes());
    for sector in [sectors, sectors - 1, u64::MAX, u64::MAX / 512] {
        assert_eq!(read(&mut driver, 0, sector, 1024).1, IOERR);
        assert_eq!(write(&mut driver, 0, sector, &[7; 1024]), IOERR);
    }
    assert_eq!(read(&mut driver, 0, sectors - 1, 512), (vec![0; 512], OK));
    assert_eq!(disk.as_file().metadata().unwrap().len(), DISK_BYTES);
}

#[test]
fn a_read_only_disk_refuses_writes_and_may_be_shared() {
    let disk = image();
    let first = start(&disk, &["--read-only"]);
    let second = start(&disk, &["--read-only"]);
    for daemon in [&first, &second] {
        let mut driver = Driver::connect(&daemon.socket(), &Options::default());
        assert_ne!(driver.features() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
        assert_eq!(write(&mut driver, 0, 0, &[7; 512]), IOERR);
        assert_eq!(read(&mut driver, 0, 0, 512), (vec![0; 512], OK));
    }
}

#[test]
fn the_serial_number_is_what_was_given() {
    let disk = image();
    let daemon = start(&disk, &["--serial", "nacre-0001"]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let header = header(GET_ID, 0);
    let bytes = driver.request(0, &[Buffer::Out(&header), Buffer::In(20), Buffer::In(1)]);
    assert_eq!(&bytes[..10], b"nacre-0001");
    assert_eq!(bytes[10..], [0; 11]);
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes() {
    for engine in ["auto", "blocking"] {
        discard_and_zero(engine);
    }
}

fn discard_and_zero(engine: &str) {
    let disk = image();
    let daemon = start(&disk, &["--engine", engine]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let offered = |driver: &Driver, bit: u32| driver.features() & 1 << bit != 0;
    for (kind, bit, flags) in [(DISCARD, 13, 0), (WRITE_ZEROES, 14, 0), (WRITE_ZEROES, 14, 1)] {
        assert_eq!(write(&mut driver, 0, 0, &pattern(3, 64 << 10)), OK);
        let status = simple(&mut driver, kind, &range(8, 16, flags));
        if !offered(&driver, bit) {
            // The file system under the test can't do it.
            assert_eq!(status, UNSUPP);
            continue;
        }
        assert_eq!(status, OK);
        let (bytes, status) = read(&mut driver, 0, 0, 64 << 10);
        assert_eq!(status, OK);
        let mut expected = pattern(3, 64 << 10);
        expected[8 * 512..24 * 512].fill(0);
        assert!(bytes == expected, "request {kind} with flags {flags}");
    }
    let past_end = range(DISK_BYTES / 512 - 1, 2, 0);
    assert_ne!(simple(&mut driver, DISCARD, &past_end), OK);
    assert_ne!(simple(&mut driver, WRITE_ZEROES, &past_end), OK);
    assert_ne!(simple(&mut driver, WRITE_ZEROES, &range(0, 1, 0x80)), OK);
    assert_ne!(simple(&mut driver, DISCARD, &[0; 15]), OK);
}

#[test]
fn requests_that_make_no_sense_are_answered_and_hurt_nobody() {
    let disk = image();
    let mut daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let unknown = header(77, 0);
    let short = [0; 3];
    let read_header = header(IN, 0);
    assert_eq!(driver.request(0, &[Buffer::Out(&unknown), Buffer::In(1)]), [UNSUPP]);
    assert_eq!(driver.request(0, &[Buffer::Out(&short), Buffer::In(1)]), [IOERR]);
    let odd = [Buffer::Out(&read_header), Buffer::In(100), Buffer::In(1)];
    assert_eq!(driver.request(0, &odd).last(), Some(&IOERR));
    let no_status = driver.submit(0, &[Buffer::Out(&read_header)]);
    assert_eq!(driver.wait(0, no_status).written_bytes, 0);
    let only_in = driver.submit(0, &[Buffer::In(513)]);
    assert_eq!(driver.wait(0, only_in).bytes.last(), Some(&IOERR));
    assert_eq!(read(&mut driver, 0, 0, 512).1, OK);
    assert!(daemon.is_running());
}

#[test]
fn data_and_status_may_be_cut_into_any_pieces() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let (header, data) = (header(OUT, 2), pattern(9, 1024));
    let pieces = [
        Buffer::Out(&header[..5]),
        Buffer::Out(&[header[5..].to_vec(), data[..7].to_vec()].concat()),
        Buffer::Out(&data[7..700]),
        Buffer::Out(&data[700..]),
        Buffer::In(1),
    ];
    assert_eq!(driver.request(0, &pieces), [OK]);
    let header = self::header(IN, 2);
    let pieces = [Buffer::Out(&header), Buffer::In(3), Buffer::In(1000), Buffer::In(22)];
    let bytes = driver.request(0, &pieces);
    assert_eq!((&bytes[..1024], bytes[1024]), (&data[..], OK));
}

#[test]
fn a_malformed_chain_stops_its_queue_until_reset_and_not_the_process() {
    let disk = image();
    let mut daemon = start(&disk, &["--num-queues", "2"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    assert_eq!(write(&mut driver, 1, 0, &pattern(5, 512)), OK);
    for what in Malformed::ALL {
        driver.submit_malformed(0, what);
        assert!(driver.wait_for_error(0), "{what:?} is not reported");
        assert_eq!(read(&mut driver, 1, 0, 512), (pattern(5, 512), OK), "{what:?}");
        driver.reset();
        assert_eq!(read(&mut driver, 0, 0, 512), (pattern(5, 512), OK), "{what:?}");
    }
    assert!(daemon.is_running());
}

#[test]
fn a_second_frontend_is_served_after_the_first_went() {
    let disk = image();
    let mut daemon = start(&disk, &[]);
    let mut first = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(write(&mut first, 0, 0, &pattern(1, 512)), OK);
    drop(first);
    let mut second = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(read(&mut second, 0, 0, 512), (pattern(1, 512), OK));
    assert!(daemon.is_running());
}

#[test]
fn a_frontend_that_comes_back_finds_its_rings_where_it_left_them() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    for sector in 0..10 {
        assert_eq!(write(&mut driver, 0, sector, &pattern(sector, 512)), OK);
    }
    let stopped_at = driver.stop_queue(0);
    assert_eq!(stopped_at, 10);
    // Nobody kicks after the restart: what waits in the ring has to be found.
    let header = header(IN, 7);
    let waiting = driver.offer(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    driver.reconnect(&daemon.socket());
    let answer = driver.wait(0, waiting);
    assert_eq!((&answer.bytes[..512], answer.bytes[512]), (&pattern(7, 512)[..], OK));
}

#[test]
fn a_disabled_queue_rests_until_it_is_enabled() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.enable_queue(0, false);
    let header = header(IN, 0);
    let waiting = driver.submit(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    // The answer to this message comes after whatever the kick could have started.
    driver.config(0, 8);
    assert_eq!(driver.in_flight(0), 1);
    driver.enable_queue(0, true);
    assert_eq!(driver.wait(0, waiting).bytes[512], OK);
}

#[test]
fn memory_comes_and_goes_while_the_disk_works() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(write(&mut driver, 0, 0, &pattern(1, 4096)), OK);
    let region = driver.add_memory(1 << 20);
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(1, 4096), OK));
    driver.resend_memory();
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(1, 4096), OK));
    driver.remove_memory(region);
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(1, 4096), OK));
}

#[test]
fn bytes_that_are_no_message_end_the_connection_only() {
    let disk = image();
    let mut daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.send_garbage(&[0xff; 64]);
    let mut next = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(read(&mut next, 0, 0, 512).1, OK);
    assert!(daemon.is_running());
}

#[test]
fn a_queue_stops_only_after_what_it_took_is_answered() {
    let disk = image();
    let daemon = start(&disk, &["--direct"]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let header = header(OUT, 0);
    let data = pattern(1, 64 << 10);
    let chain = [Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)];
    let mut base = 0;
    for _round in 0..20 {
        let requests = [(); 16].map(|()| driver.submit(0, &chain));
        let stopped_at = driver.stop_queue(0);
        let taken = usize::from(stopped_at.wrapping_sub(base));
        assert_eq!(driver.in_flight(0), 16 - taken, "taken, and neither answered nor left");
        driver.start_queue(0, stopped_at);
        for request in requests {
            assert_eq!(driver.wait(0, request).bytes, [OK]);
        }
        base += 16;
    }
}

#[test]
fn direct_io_copes_with_memory_that_is_not_aligned() {
    for (misaligned_bytes, engine) in [(0, "auto"), (3, "auto"), (0, "blocking"), (3, "blocking")] {
        let disk = image();
        let daemon = start(&disk, &["--direct", "--engine", engine]);
        let options = Options { misaligned_bytes, ..Options::default() };
        let mut driver = Driver::connect(&daemon.socket(), &options);
        let data = pattern(misaligned_bytes + 1, 600 << 10);
        assert_eq!(write(&mut driver, 0, 0, &data), OK, "{}", daemon.log());
        let (bytes, status) = read(&mut driver, 0, 0, 600 << 10);
        assert_eq!(status, OK);
        assert!(bytes == data);
    }
}

#[test]
fn a_guest_that_can_t_flush_writes_through() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let options = Options { features: !(1 << 9), ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    assert_eq!(write(&mut driver, 0, 0, &pattern(2, 4096)), OK);
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(2, 4096), OK));
}

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
#[test]
fn with_a_connected_socket_it_serves_one_frontend_and_ends() {
    let disk = image();
    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("ready");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg("exec \"$0\" --fd 5 --disk-fd 6 --ready-fd 7 5<&0 6<>\"$1\" 7>\"$2\"")
        .arg(env!("CARGO_BIN_EXE_nacre-blk"))
        .args([disk.path(), &ready])
        .stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut daemon = Daemon::spawn(command, folder);
    let mut driver = Driver::adopt(ours, &Options::default());
    assert_eq!(write(&mut driver, 0, 0, &pattern(4, 512)), OK);
    assert_eq!(fs::read(&ready).unwrap(), b"ready\n");
    drop(driver);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    let mut first = [0; 512];
    File::open(disk.path()).unwrap().read_exact(&mut first).unwrap();
    assert_eq!(first, *pattern(4, 512));
}
