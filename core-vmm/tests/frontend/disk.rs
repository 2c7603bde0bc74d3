//! The frontend against whole programs: a disk of QEMU's, and our own, killed in the end.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use core_vmm::virtio::{DeviceConfig, DeviceKind};
use tempfile::TempDir;

use crate::guest::Guest;
use crate::{NEEDS_RESET, negotiate};

const BLOCK: DeviceKind = DeviceKind(2);
const SECTOR_BYTES: usize = 512;
const SECTORS: u64 = 64;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;

/// A program that serves a disk, killed at the end.
struct Program {
    child: Child,
    socket: UnixStream,
    _folder: TempDir,
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// `None`, and a word about it, if there is no such program.
fn start(program: &Path, arguments: impl Fn(&Path, &Path) -> Vec<OsString>) -> Option<Program> {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    File::create(&image).unwrap().set_len(SECTORS * SECTOR_BYTES as u64).unwrap();
    let started =
        Command::new(program).args(arguments(&image, &socket)).stdin(Stdio::null()).spawn();
    let child = match started {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: there is no {}", program.display());
            return None;
        }
        other => other.unwrap(),
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let socket = loop {
        match UnixStream::connect(&socket) {
            Ok(socket) => break socket,
            Err(error) => {
                assert!(Instant::now() < deadline, "{program:?} does not listen: {error}");
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Some(Program { child, socket, _folder: folder })
}

fn qemu_storage_daemon() -> Option<Program> {
    start(Path::new("qemu-storage-daemon"), |image, socket| {
        let (image, socket) = (image.display(), socket.display());
        let export = format!(
            "vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}"
        );
        let node = format!("file,node-name=d,filename={image}");
        vec!["--blockdev".into(), node.into(), "--export".into(), export.into()]
    })
}

/// Next to the tests, if it was built.
fn nacre_blk() -> Option<Program> {
    let mut program: PathBuf = std::env::current_exe().unwrap();
    program.pop();
    program.pop();
    program.push("nacre-blk");
    start(&program, |image, socket| {
        vec!["--disk".into(), image.into(), "--socket-path".into(), socket.into()]
    })
}

/// One request; what was read, if anything was to be.
fn request(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let status = match kind {
        READ => {
            guest.submit_parts(0, &[&header], &[SECTOR_BYTES, 1]);
            2
        }
        WRITE => {
            guest.submit_parts(0, &[&header, data], &[1]);
            2
        }
        _ => {
            guest.submit_parts(0, &[&header], &[1]);
            1
        }
    };
    guest.run_until("the disk answers", |guest| {
        guest.take_interrupt(0) && guest.written(0, status, 1).is_some()
    });
    assert_eq!(guest.written(0, status, 1).unwrap(), [OK]);
    guest.written(0, 1, SECTOR_BYTES).unwrap()
}

fn use_and_lose(mut program: Program) {
    let backend = negotiate(DeviceConfig::new("disk", BLOCK), &program.socket).unwrap();
    let mut guest = Guest::new(backend);
    for round in 1..=3_u8 {
        guest.bring_up();
        assert_eq!(guest.read(0x2000, 8), SECTORS, "the capacity");
        request(&mut guest, WRITE, 7, &[round; SECTOR_BYTES]);
        request(&mut guest, FLUSH, 0, &[]);
        assert_eq!(request(&mut guest, READ, 7, &[]), [round; SECTOR_BYTES]);
        assert_eq!(request(&mut guest, READ, 8, &[]), [0; SECTOR_BYTES]);
    }
    program.child.kill().unwrap();
    guest.run_until("it is noticed", |guest| guest.status() == 15 | NEEDS_RESET);
    assert!(guest.is_quiet());
}

#[test]
fn a_disk_of_qemus_is_used_reset_and_lost() {
    qemu_storage_daemon().into_iter().for_each(use_and_lose);
}

#[test]
fn a_disk_of_ours_is_used_reset_and_lost() {
    nacre_blk().into_iter().for_each(use_and_lose);
}
