//! The frontend against whole programs: a disk of QEMU's, and our own, killed in the end.

use std::fs::File;
use std::path::Path;

use core_vmm::virtio::{DeviceConfig, DeviceKind};

use crate::guest::Guest;
use crate::program::{Program, built};
use crate::{NEEDS_RESET, negotiate};

const BLOCK: DeviceKind = DeviceKind(2);
const SECTOR_BYTES: usize = 512;
const SECTORS: u64 = 64;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;

fn qemu_storage_daemon() -> Option<Program> {
    Program::start(Path::new("qemu-storage-daemon"), |image, socket| {
        File::create(image).unwrap().set_len(SECTORS * SECTOR_BYTES as u64).unwrap();
        let (image, socket) = (image.display(), socket.display());
        let export = format!(
            "vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}"
        );
        let node = format!("file,node-name=d,filename={image}");
        vec!["--blockdev".into(), node.into(), "--export".into(), export.into()]
    })
}

fn nacre_blk() -> Option<Program> {
    Program::start(&built("nacre-blk"), |image, socket| {
        File::create(image).unwrap().set_len(SECTORS * SECTOR_BYTES as u64).unwrap();
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
    program.kill();
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
