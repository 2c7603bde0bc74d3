//! A disk whose writes take as long as a test wants: a file system of one file, served here.
//!
//! Direct I/O on it is asynchronous in the kernel, as on a real disk: a write that was handed to
//! io_uring outlives the process that did so.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use backend_daemon::testing::DEADLINE;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use tempfile::NamedTempFile;

use super::sys::own_mounts;

const REQUEST_HEADER_BYTES: usize = 40;
/// `fuse_write_in`.
const WRITE_HEADER_BYTES: usize = 40;
/// `FUSE_ASYNC_DIO` and `FUSE_BIG_WRITES`.
const FLAGS: u32 = 1 << 15 | 1 << 5;
const NO_SUCH_CALL: i32 = -38;

/// A write that nobody has answered.
struct Held {
    unique: u64,
    offset: usize,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    holds: bool,
    held: Vec<Held>,
}

/// The disk; seen only by the thread that made it, and by the programs that it starts.
pub(crate) struct SlowDisk {
    file: NamedTempFile,
    server: Arc<Server>,
}

struct Server {
    device: File,
    content: Mutex<Content>,
    changed: Condvar,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl SlowDisk {
    /// Makes one; says on standard error if it can't be had.
    pub(crate) fn mount(len_bytes: usize) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = match (device, own_mounts()) {
            (Ok(device), Ok(())) => device,
            (device, mounts) => {
                eprintln!("SKIPPED: no FUSE or no namespace: {:?} {mounts:?}", device.err());
                return None;
            }
        };
        let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let data = format!("fd={},rootmode=100000,user_id=0,group_id=0", device.as_raw_fd());
        let data = CString::new(data).unwrap();
        mount("slow", file.path(), "fuse", MountFlags::empty(), data.as_c_str()).unwrap();
        let content = Content { bytes: vec![0; len_bytes], ..Content::default() };
        let server =
            Arc::new(Server { device, content: Mutex::new(content), changed: Condvar::new() });
        let serving = Arc::clone(&server);
        // It ends with the mount, which ends with the namespace.
        thread::spawn(move || serving.serve());
        Some(Self { file, server })
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new(self.file.path()).to_owned()
    }

    /// Lets no write end from now on.
    pub(crate) fn hold(&self) {
        self.server.content.lock().unwrap().holds = true;
    }

    /// Waits until a write is held up.
    pub(crate) fn wait_for_held(&self) {
        let content = self.server.content.lock().unwrap();
        let none = |content: &mut Content| content.held.is_empty();
        let waited = self.server.changed.wait_timeout_while(content, DEADLINE, none).unwrap();
        assert!(!waited.1.timed_out(), "no write has come");
    }

    /// Lets what was held up reach the disk, and all that follows at once.
    pub(crate) fn release(&self) {
        let mut content = self.server.content.lock().unwrap();
        content.holds = false;
        for held in std::mem::take(&mut content.held) {
            content.write(&held);
            self.server.answer_write(&held);
        }
    }

    pub(crate) fn bytes(&self, offset: usize, len_bytes: usize) -> Vec<u8> {
        self.server.content.lock().unwrap().bytes[offset..offset + len_bytes].to_vec()
    }
}

impl Content {
    fn write(&mut self, write: &Held) {
        self.bytes[write.offset..write.offset + write.bytes.len()].copy_from_slice(&write.bytes);
    }

    /// `fuse_attr_out`: a file that everybody may use.
    fn attributes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        let len_bytes = self.bytes.len() as u64;
        [1, len_bytes, len_bytes / 512, 0, 0, 0]
            .map(u64::to_le_bytes)
            .iter()
            .for_each(|word| bytes.extend(word));
        for word in [0_u32, 0, 0, 0o100_666, 1, 0, 0, 0, 4096, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }
}

impl Server {
    fn serve(&self) {
        let mut request = vec![0; 1 << 18];
        while let Ok(len) = (&self.device).read(&mut request) {
            self.take(&request[..len]);
        }
    }

    fn take(&self, request: &[u8]) {
        let (code, unique) = (u32_at(request, 4), u64_at(request, 8));
        let arguments = &request[REQUEST_HEADER_BYTES..];
        let mut content = self.content.lock().unwrap();
        match code {
            // FORGET, INTERRUPT and BATCH_FORGET have no answer.
            2 | 36 | 42 => {}
            // GETATTR and SETATTR
            3 | 4 => self.answer(unique, 0, &content.attributes()),
            // OPEN: a handle, flags
            14 => self.answer(unique, 0, &[0; 16]),
            // READ
            15 => {
                let offset = usize::try_from(u64_at(arguments, 8)).unwrap();
                let len = u32_at(arguments, 16) as usize;
                let end = (offset + len).min(content.bytes.len());
                self.answer(unique, 0, &content.bytes[offset.min(end)..end]);
            }
            // WRITE
            16 => {
                let offset = usize::try_from(u64_at(arguments, 8)).unwrap();
                let bytes = arguments[WRITE_HEADER_BYTES..].to_vec();
                let write = Held { unique, offset, bytes };
                if content.holds {
                    content.held.push(write);
                    self.changed.notify_all();
                } else {
                    content.write(&write);
                    self.answer_write(&write);
                }
            }
            // RELEASE, FSYNC and FLUSH
            18 | 20 | 25 => self.answer(unique, 0, &[]),
            // INIT
            26 => self.answer(unique, 0, &init()),
            _ => self.answer(unique, NO_SUCH_CALL, &[]),
        }
    }

    fn answer_write(&self, write: &Held) {
        let len = u32::try_from(write.bytes.len()).unwrap();
        self.answer(write.unique, 0, [len, 0].map(u32::to_le_bytes).as_flattened());
    }

    fn answer(&self, unique: u64, error: i32, payload: &[u8]) {
        let len = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend(error.to_le_bytes());
        bytes.extend(unique.to_le_bytes());
        bytes.extend(payload);
        // Who asked may have been killed meanwhile.
        match (&self.device).write(&bytes) {
            Ok(_) | Err(_) => {}
        }
    }
}

/// `fuse_init_out`, of version 7.31.
fn init() -> Vec<u8> {
    let (background, congestion, most_written_bytes) = (64 | 64 << 16, 0_u32, 128 << 10);
    let mut bytes = Vec::new();
    for word in [7, 31, 128 << 10, FLAGS, background, most_written_bytes, 1, congestion] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(64, 0);
    bytes
}
