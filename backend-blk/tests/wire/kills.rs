//! The process is killed again and again under load, and the guest sees nothing of it.
//!
//! The environment makes these tests longer: `NACRE_TORTURE_SEEDS`, `NACRE_TORTURE_KILLS` for each
//! seed, and `NACRE_TORTURE_STEPS`.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use backend_daemon::testing::{Buffer, DEADLINE, Daemon, Driver, Options, connect_soon};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::Signal;
use tempfile::NamedTempFile;

use super::guest::{Dice, Guest};
use super::{OK, OUT, header, image, pattern, read, start, write};

fn from_environment(name: &str, otherwise: u32) -> u32 {
    env::var(name).map_or(otherwise, |value| value.parse().unwrap())
}

/// One guest's storm, with all that follows from its seed.
struct Storm {
    disk: NamedTempFile,
    arguments: Vec<String>,
    daemon: Daemon,
    guest: Guest,
    left_in_flight: usize,
}

/// How a device is used, and the arguments to have it so.
fn device(dice: &mut Dice) -> (Options, Vec<String>) {
    let options = Options {
        inflight: true,
        queues: 1 << dice.roll(3),
        queue_size: 64 << dice.roll(3),
        event_idx: dice.is_head(),
        indirect: dice.is_head(),
        misaligned_bytes: [0, 0, 8, 512][usize::try_from(dice.roll(4)).unwrap()],
        ..Options::default()
    };
    let (queues, size) = (options.queues.to_string(), options.queue_size.to_string());
    let engine = if dice.roll(4) == 0 { "blocking" } else { "auto" };
    let words = ["--lock-wait", "60", "--engine", engine, "--num-queues", &queues];
    let mut arguments: Vec<String> = words.map(str::to_owned).to_vec();
    arguments.extend(["--queue-size".to_owned(), size]);
    arguments.extend(dice.is_head().then(|| "--direct".to_owned()));
    (options, arguments)
}

impl Storm {
    fn begin(options: Options, arguments: Vec<String>, dice: Dice) -> Self {
        let disk = image();
        let daemon = start(&disk, &words(&arguments));
        let driver = Driver::connect(&daemon.socket(), &options);
        let guest = Guest::new(driver, options, dice);
        Self { disk, arguments, daemon, guest, left_in_flight: 0 }
    }

    /// Kills the process some time after `work` has begun, and gives its successor's socket.
    fn kill_during(&mut self, delay: Duration, work: impl FnOnce(&mut Guest, &AtomicBool)) {
        self.daemon.kill_during(delay, |over| work(&mut self.guest, over));
        self.daemon.wait();
    }

    /// One process's life.
    fn round(&mut self, stream: UnixStream) {
        let delay = Duration::from_micros(self.guest.dice.roll(3000));
        match self.guest.dice.roll(3) {
            // In the midst of the handshake, or of what its predecessor has left.
            0 => self.kill_during(delay / 2, |guest, _over| {
                guest.submit();
                // Whether it gets so far does not matter.
                let _serves = guest.driver.reconnects(stream);
                guest.collect();
            }),
            // In the midst of work.
            _ => {
                assert!(self.guest.driver.reconnects(stream));
                self.guest.work();
                self.kill_during(delay, |guest, over| {
                    while !over.load(Ordering::Acquire) {
                        guest.submit();
                        guest.collect();
                    }
                });
            }
        }
        self.guest.collect();
        self.left_in_flight += self.guest.marked();
        self.guest.submit();
        // The others start while their predecessor's writes may still be on their way.
        if self.guest.dice.is_head() {
            self.check();
        }
    }

    /// Looks at the disk once nothing of the dead process holds it.
    fn check(&mut self) {
        let own = self.disk.reopen().unwrap();
        let deadline = Instant::now() + DEADLINE;
        while fcntl_lock(&own, FlockOperation::NonBlockingLockExclusive).is_err() {
            assert!(Instant::now() < deadline, "the disk stays locked");
            thread::sleep(Duration::from_millis(1));
        }
        self.guest.check(self.disk.as_file());
        // The lock goes with the descriptor.
    }

    fn start(&mut self) -> UnixStream {
        self.daemon = start(&self.disk, &words(&self.arguments));
        connect_soon(&self.daemon.socket())
    }

    /// A last successor answers all that is left.
    fn end(mut self) {
        let stream = self.start();
        assert!(self.guest.driver.reconnects(stream));
        self.guest.finish();
        self.guest.check(self.disk.as_file());
    }
}

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

fn torture(seed: u64, kills: u32) -> usize {
    let mut dice = Dice::new(seed);
    let (options, arguments) = device(&mut dice);
    eprintln!("seed {seed}: {options:?} {arguments:?}");
    let mut storm = Storm::begin(options, arguments, dice);
    storm.guest.work();
    storm.daemon.signal(Signal::KILL);
    storm.daemon.wait();
    for _kill in 1..kills {
        let stream = storm.start();
        storm.round(stream);
    }
    let left = storm.left_in_flight;
    storm.end();
    left
}

#[test]
fn kills_at_random_moments_lose_nothing_and_repeat_nothing() {
    let seeds = from_environment("NACRE_TORTURE_SEEDS", 8).into();
    let kills = from_environment("NACRE_TORTURE_KILLS", 30);
    let left: usize = (0..seeds).map(|seed| torture(seed, kills)).sum();
    assert!(left > 0, "no kill left anything in flight");
}

/// What a process may die at that serves a block device over the wire.
const STEPS: [&str; 10] = [
    "MessageCame",
    "MessageHandled",
    "Served",
    "Announced",
    "Counted",
    "Marked",
    "Linked",
    "Listed",
    "Published",
    "Cleared",
];

#[test]
fn a_death_at_any_step_loses_nothing_and_repeats_nothing() {
    let steps = from_environment("NACRE_TORTURE_STEPS", 200);
    let options = Options { inflight: true, queues: 2, ..Options::default() };
    let arguments = ["--lock-wait", "60", "--num-queues", "2"].map(str::to_owned).to_vec();
    let mut storm = Storm::begin(options, arguments, Dice::new(1));
    storm.guest.work();
    storm.daemon.signal(Signal::KILL);
    storm.daemon.wait();
    let mut died_at = BTreeSet::new();
    for step in 1..=steps {
        let mut words: Vec<&OsStr> = vec!["--disk".as_ref(), storm.disk.path().as_os_str()];
        words.extend(storm.arguments.iter().map(OsStr::new));
        storm.daemon = Daemon::start_doomed(env!("CARGO_BIN_EXE_nacre-blk"), &words, step);
        storm.guest.submit();
        let stream = connect_soon(&storm.daemon.socket());
        let deadline = Instant::now() + DEADLINE;
        if storm.guest.driver.reconnects(stream) {
            while storm.daemon.is_running() {
                assert!(Instant::now() < deadline, "step {step} never comes");
                storm.guest.submit();
                storm.guest.collect();
            }
        }
        storm.daemon.wait();
        storm.guest.collect();
        storm.check();
        let log = storm.daemon.log();
        let fault = log.lines().find_map(|line| line.strip_prefix("fault: dies at "));
        died_at.insert(fault.unwrap_or_else(|| panic!("it died of itself: {log}")).to_owned());
    }
    storm.end();
    for step in STEPS {
        assert!(died_at.contains(step), "nothing died at {step}: {died_at:?}");
    }
}

#[test]
fn frontends_that_come_and_go_under_load_lose_nothing_and_repeat_nothing() {
    let mut dice = Dice::new(7);
    let (options, arguments) = device(&mut dice);
    let mut storm = Storm::begin(options, arguments, dice);
    for _frontend in 0..50 {
        storm.guest.work();
        storm.guest.submit();
        storm.guest.driver.reconnect(&storm.daemon.socket());
    }
    storm.guest.finish();
    assert!(storm.daemon.is_running());
    storm.guest.check(storm.disk.as_file());
}

#[test]
fn a_reset_leaves_nothing_in_flight_to_a_successor() {
    let disk = image();
    let mut daemon = start(&disk, &["--lock-wait", "60"]);
    let options = Options { inflight: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    for round in 0..10 {
        let (header, data) = (header(OUT, 0), pattern(round, 4096));
        let buffers = [Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)];
        (0..16).for_each(|_request| {
            driver.submit(0, &buffers);
        });
        driver.reset();
        assert!(driver.inflight_region()[16..].chunks(16).all(|entry| entry[0] == 0));
        assert_eq!(write(&mut driver, 0, 8, &pattern(round, 512)), OK);
        daemon.signal(Signal::KILL);
        daemon.wait();
        daemon = start(&disk, &["--lock-wait", "60"]);
        driver.reconnect(&daemon.socket());
        assert_eq!(read(&mut driver, 0, 8, 512), (pattern(round, 512), OK));
        assert_eq!(driver.in_flight(0), 0);
    }
}

#[test]
fn after_a_stop_nothing_is_marked_in_flight_and_the_base_says_it_all() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let options = Options { inflight: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    for sector in 0..10 {
        assert_eq!(write(&mut driver, 0, sector, &pattern(sector, 512)), OK);
    }
    let region = driver.inflight_region();
    assert_eq!(region[8..12], [1, 0, 0, 4], "version, and entries for the largest ring");
    assert_eq!(region[14..16], [10, 0], "the used index");
    assert_eq!(driver.stop_queue(0), 10);
    let region = driver.inflight_region();
    assert!(region[16..].chunks(16).all(|entry| entry[0] == 0), "nothing is marked");
    driver.start_queue(0, 10);
    assert_eq!(read(&mut driver, 0, 3, 512), (pattern(3, 512), OK));
    driver.reset();
    assert_eq!(read(&mut driver, 0, 4, 512), (pattern(4, 512), OK));
}
