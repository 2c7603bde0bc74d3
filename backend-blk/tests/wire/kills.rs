//! The process is killed again and again under load, and the guest sees nothing of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use backend_daemon::testing::{Buffer, DEADLINE, Daemon, Driver, Options, Request};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::Signal;
use tempfile::NamedTempFile;

use super::{DISK_BYTES, FLUSH, OK, OUT, header, image, pattern, read, start, write};

const BLOCK_BYTES: u64 = 4096;
const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;
const DEPTH: usize = 32;
const KILLS: u32 = 300;

/// A request on its way.
struct Pending {
    request: Request,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    /// One of a block's versions.
    Write { block: u64, version: u64 },
    /// Takes longer than a write, so that answers come out of order.
    Flush,
}

impl Pending {
    fn writes_to(&self, to: u64) -> bool {
        matches!(self.what, What::Write { block, .. } if block == to)
    }
}

/// What a guest knows of its disk.
struct Guest {
    driver: Driver,
    dice: u64,
    acknowledged: Vec<u64>,
    pending: Vec<Pending>,
    submitted: u64,
    answered: u64,
}

fn bytes(block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; usize::try_from(BLOCK_BYTES).unwrap()];
    }
    pattern(block << 32 | version, usize::try_from(BLOCK_BYTES).unwrap())
}

impl Guest {
    fn new(driver: Driver) -> Self {
        let acknowledged = vec![0; usize::try_from(BLOCKS).unwrap()];
        Self { driver, dice: 1, acknowledged, pending: Vec::new(), submitted: 0, answered: 0 }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice =
            self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.dice >> 33) % sides
    }

    fn version(&mut self, block: u64) -> &mut u64 {
        &mut self.acknowledged[usize::try_from(block).unwrap()]
    }

    /// Fills the queue, with at most one write to a block at a time.
    fn submit(&mut self) {
        while self.pending.len() < DEPTH {
            let block = self.roll(BLOCKS);
            if self.roll(8) == 0 {
                let header = header(FLUSH, 0);
                let request = self.driver.submit(0, &[Buffer::Out(&header), Buffer::In(1)]);
                self.pending.push(Pending { request, what: What::Flush });
            } else if !self.pending.iter().any(|pending| pending.writes_to(block)) {
                let version = *self.version(block) + 1;
                let (header, data) =
                    (header(OUT, block * BLOCK_BYTES / 512), bytes(block, version));
                let buffers = [Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)];
                let request = self.driver.submit(0, &buffers);
                self.pending.push(Pending { request, what: What::Write { block, version } });
            } else {
                continue;
            }
            self.submitted += 1;
        }
    }

    /// Takes what was answered; that nothing is answered twice, the driver sees to.
    fn collect(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            let Some(answer) = self.driver.wait_for(0, pending.request, Duration::ZERO) else {
                self.pending.push(pending);
                continue;
            };
            assert_eq!(answer.bytes, [OK]);
            if let What::Write { block, version } = pending.what {
                *self.version(block) = version;
            }
            self.answered += 1;
        }
    }

    /// Goes on until something is answered.
    fn work(&mut self) {
        let (answered, deadline) = (self.answered, Instant::now() + DEADLINE);
        while self.answered == answered {
            assert!(Instant::now() < deadline, "nothing is answered any more");
            self.submit();
            self.collect();
        }
    }

    /// How many requests the device has marked, and has not answered.
    fn marked(&self) -> usize {
        let region = self.driver.inflight_region();
        region[16..].chunks_exact(16).filter(|entry| entry[0] != 0).count()
    }

    /// Looks at the disk while nobody writes there: each block is what was acknowledged, or what
    /// is on its way.
    fn check(&mut self, disk: &File) {
        let mut found = vec![0; usize::try_from(BLOCK_BYTES).unwrap()];
        for block in 0..BLOCKS {
            disk.read_exact_at(&mut found, block * BLOCK_BYTES).unwrap();
            let version = *self.version(block);
            let on_its_way = self.pending.iter().any(|pending| pending.writes_to(block));
            let is_new = on_its_way && found == bytes(block, version + 1);
            assert!(is_new || found == bytes(block, version), "block {block} lost {version}");
        }
    }
}

/// Kills the daemon, and waits until it is gone and nothing of it holds the disk.
fn kill(daemon: &mut Daemon, disk: &NamedTempFile) {
    daemon.signal(Signal::KILL);
    daemon.wait();
    let own = disk.reopen().unwrap();
    let deadline = Instant::now() + DEADLINE;
    while fcntl_lock(&own, FlockOperation::NonBlockingLockExclusive).is_err() {
        assert!(Instant::now() < deadline, "the disk stays locked");
        thread::sleep(Duration::from_millis(1));
    }
    // The lock goes with the descriptor.
}

fn kill_again_and_again(engine: &str, is_plain: bool, kills: u32) {
    let disk = image();
    let extra = ["--direct", "--queue-size", "128", "--engine", engine];
    let mut daemon = start(&disk, &extra);
    let options = Options { inflight: true, event_idx: !is_plain, ..Options::default() };
    let options = Options { indirect: !is_plain, queue_size: 128, ..options };
    let mut guest = Guest::new(Driver::connect(&daemon.socket(), &options));
    let mut left_in_flight = 0;
    for round in 0..kills {
        // Every other one at once, in the midst of what its predecessor has left.
        if round % 2 == 1 {
            guest.work();
        }
        let until = Instant::now() + Duration::from_micros(guest.roll(2000));
        while Instant::now() < until {
            guest.submit();
            guest.collect();
        }
        guest.submit();
        kill(&mut daemon, &disk);
        guest.collect();
        guest.check(disk.as_file());
        left_in_flight += guest.marked();
        daemon = start(&disk, &extra);
        guest.driver.reconnect(&daemon.socket());
    }
    let deadline = Instant::now() + DEADLINE;
    while !guest.pending.is_empty() {
        assert!(Instant::now() < deadline, "{} requests are lost", guest.pending.len());
        guest.collect();
    }
    guest.check(disk.as_file());
    assert_eq!((guest.submitted, guest.driver.in_flight(0)), (guest.answered, 0));
    assert!(left_in_flight > 0 && guest.answered > u64::from(kills / 2));
}

#[test]
fn three_hundred_kills_under_load_lose_nothing_and_repeat_nothing() {
    kill_again_and_again("auto", false, KILLS);
}

#[test]
fn kills_without_io_uring_and_the_ring_s_features_lose_nothing_either() {
    kill_again_and_again("blocking", true, 50);
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
