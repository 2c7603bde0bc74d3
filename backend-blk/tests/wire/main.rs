//! `nacre-blk` over its real socket, jailed, with a test driver in the guest's and the VMM's place.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stderr, reason = "a test says why it is skipped")]

mod guest;
mod kills;
mod late;
mod life;
mod requests;
mod rings;
mod slow_disk;
mod stand_in;
mod sys;

use std::ffi::OsStr;

use backend_daemon::testing::{Buffer, Daemon, Driver, Options};
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
