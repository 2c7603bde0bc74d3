//! A file system in user space, spoken to without a kernel: numbered records appended to an open
//! file and read back, and now and then a file that is made, and must not be there yet, and removed.
//!
//! Layouts and numbers are those of Linux's `include/uapi/linux/fuse.h`, protocol 7.31.

use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::{DeviceStatus, Transport};

use super::{Watch, wait_for_order};
use crate::dma::Identity;
use crate::{pci, say};

/// Virtio 1.3, section 5.11.
const DEVICE_ID: u16 = 26;
/// The first request queue; 0 is for requests of high priority.
const QUEUE: u16 = 1;
const VERSION_1: u64 = 1 << 32;

const ROOT: u64 = 1;
const FORGET: u32 = 2;
const UNLINK: u32 = 10;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const CREATE: u32 = 35;

const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;
/// What is known of a file that was made, before its handle.
const ENTRY_BYTES: usize = 128;

const O_RDWR: u32 = 2;
const O_EXCL: u32 = 0o200;
const O_APPEND: u32 = 0o2000;

const RECORD_BYTES: u32 = 512;
/// A file is made and removed after so many records.
const MAKE_EVERY: u64 = 8;
/// More of a file is not looked at for a record that came twice.
const FARTHEST: u64 = 4;

struct Fuse {
    transport: PciTransport,
    queue: VirtQueue<Identity, 16>,
    unique: u64,
}

/// An open file.
#[derive(Clone, Copy)]
struct File {
    node: u64,
    handle: u64,
    flags: u32,
}

/// Goes on until the host has enough; then the file has to end after its last record.
pub fn run() {
    let mut fuse = Fuse::start();
    let log = fuse.create("log", O_RDWR | O_APPEND).expect("a new file");
    let mut watch = Watch::start();
    let mut number = 0;
    // Where the next record is, counted in records: further on than its number if one came twice.
    let mut place = 0;
    while !watch.is_over() {
        match fuse.append(log, number) {
            Ok(()) => place = fuse.check(log, number, place, &mut watch),
            Err(errno) => failed("append", errno, &mut watch),
        }
        watch.completed();
        number += 1;
        if number % MAKE_EVERY == 0 {
            match fuse.make_and_remove() {
                Ok(()) => {}
                Err(errno) => failed("make and remove", errno, &mut watch),
            }
            watch.completed();
        }
    }
    if fuse.read(log, place) != Ok(None) {
        watch.tally.repeated += 1;
        say!("the file goes on after its last record");
    }
    watch.report();
}

/// Mounts, waits for any order of the host, mounts once more, and makes a file.
pub fn mount_twice() {
    let mut fuse = Fuse::start();
    say!("READY");
    wait_for_order();
    fuse.mount();
    fuse.make_and_remove().expect("a file is made and removed");
}

fn failed(what: &str, errno: i32, watch: &mut Watch) {
    watch.tally.errors += 1;
    say!("cannot {what}: error {errno}");
}

impl Fuse {
    fn start() -> Self {
        let function = pci::find_id(0x1040 + DEVICE_ID).expect("a file system device");
        pci::enable(function);
        let mut transport = pci::transport_in_disguise(function);
        transport.set_status(DeviceStatus::empty());
        transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        assert_ne!(transport.read_device_features() & VERSION_1, 0, "a modern device");
        transport.write_driver_features(VERSION_1);
        let features_ok =
            DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        transport.set_status(features_ok);
        let queue = VirtQueue::new(&mut transport, QUEUE, false, false).expect("a request queue");
        transport.set_status(features_ok | DeviceStatus::DRIVER_OK);
        let mut fuse = Self { transport, queue, unique: 0 };
        fuse.mount();
        fuse
    }

    fn mount(&mut self) {
        // Version 7.31, read-ahead, no flags.
        let version = words(&[7, 31, 0, 0]);
        self.ask(INIT, ROOT, &[&version], 64).expect("the versions agree");
    }

    /// Sends a request and waits for its answer: what follows the header, or the error's number.
    fn ask(
        &mut self,
        opcode: u32,
        node: u64,
        parts: &[&[u8]],
        room: usize,
    ) -> Result<Vec<u8>, i32> {
        self.unique += 2;
        let body = parts.concat();
        let len = (IN_HEADER_BYTES + body.len()) as u32;
        let mut request = words(&[len, opcode]);
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(words(&[0, 0, 1, 0]));
        request.extend(body);
        let mut answer = vec![0; OUT_HEADER_BYTES + room];
        let mut answers: [&mut [u8]; 1] = [&mut answer];
        let into = if opcode == FORGET { &mut [][..] } else { &mut answers[..] };
        let used = self.queue.add_notify_wait_pop(&[&request], into, &mut self.transport);
        let used = used.expect("the request is the one that is answered") as usize;
        if opcode == FORGET {
            return Ok(Vec::new());
        }
        let unique = u64_at(&answer, 8);
        assert_eq!(unique, self.unique, "an answer of {used} bytes to another request");
        let error = u32_at(&answer, 4) as i32;
        answer.truncate(used);
        if error == 0 { Ok(answer.split_off(OUT_HEADER_BYTES)) } else { Err(-error) }
    }

    fn create(&mut self, name: &str, flags: u32) -> Result<File, i32> {
        let how = words(&[flags | O_EXCL, 0o100_600, 0, 0]);
        let parts = [&how[..], name.as_bytes(), &[0]];
        let answer = self.ask(CREATE, ROOT, &parts, ENTRY_BYTES + 16)?;
        let (node, handle) = (u64_at(&answer, 0), u64_at(&answer, ENTRY_BYTES));
        Ok(File { node, handle, flags })
    }

    fn make_and_remove(&mut self) -> Result<(), i32> {
        let file = self.create("made", O_RDWR)?;
        self.ask(UNLINK, ROOT, &[b"made\0"], 0)?;
        let release = [&file.handle.to_le_bytes()[..], &words(&[file.flags, 0, 0, 0])].concat();
        self.ask(RELEASE, file.node, &[&release], 0)?;
        self.ask(FORGET, file.node, &[&1_u64.to_le_bytes()], 0)?;
        Ok(())
    }

    fn append(&mut self, file: File, number: u64) -> Result<(), i32> {
        let record = number.to_le_bytes().repeat(RECORD_BYTES as usize / 8);
        let offset = number * u64::from(RECORD_BYTES);
        let answer = self.ask(WRITE, file.node, &[&transfer(file, offset), &record], 8)?;
        assert_eq!(u32_at(&answer, 0), RECORD_BYTES, "a short write");
        Ok(())
    }

    /// The number in the record at `place`, or none behind the last record.
    fn read(&mut self, file: File, place: u64) -> Result<Option<u64>, i32> {
        let head = transfer(file, place * u64::from(RECORD_BYTES));
        let answer = self.ask(READ, file.node, &[&head], RECORD_BYTES as usize)?;
        if answer.is_empty() {
            return Ok(None);
        }
        let number = u64_at(&answer, 0);
        let whole = answer == number.to_le_bytes().repeat(RECORD_BYTES as usize / 8);
        Ok(Some(if whole { number } else { u64::MAX }))
    }

    /// Looks for record `number`, which should be at `place`; says where the next one should be.
    fn check(&mut self, file: File, number: u64, place: u64, watch: &mut Watch) -> u64 {
        for at in place..place + FARTHEST {
            match self.read(file, at) {
                Ok(Some(found)) if found == number => return at + 1,
                Ok(Some(found)) if found < number => watch.tally.repeated += 1,
                Ok(found) => {
                    watch.tally.lost += 1;
                    say!("instead of record {number} there is {found:?}");
                    return at;
                }
                Err(errno) => {
                    failed("read", errno, watch);
                    return at + 1;
                }
            }
        }
        panic!("record {number} is nowhere near {place}");
    }
}

/// What a read and a write begin with: handle, offset, size, and nothing in the rest.
fn transfer(file: File, offset: u64) -> Vec<u8> {
    let mut bytes = file.handle.to_le_bytes().to_vec();
    bytes.extend(offset.to_le_bytes());
    bytes.extend(words(&[RECORD_BYTES, 0, 0, 0, file.flags, 0]));
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
