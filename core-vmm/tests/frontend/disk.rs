//! The frontend against whole programs: a disk of QEMU's, and our own, killed and replaced.

use std::fs::File;
use std::path::Path;

use core_vmm::virtio::{DeviceConfig, DeviceKind};
use nacre_proto::vmm::DeviceState;

use crate::cut::Cut;
use crate::guest::Guest;

use crate::program::{Program, built};
use crate::{NEEDS_RESET, negotiate};

const BLOCK: DeviceKind = DeviceKind(2);
const SECTOR_BYTES: usize = 512;
const SECTORS: u64 = 64;
/// The one behind its one queue's.
const CONFIG_VECTOR: u16 = 1;

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
        let wait = ["--lock-wait".into(), "20".into()];
        let serve = ["--disk".into(), image.into(), "--socket-path".into(), socket.into()];
        serve.into_iter().chain(wait).collect()
    })
}

/// Makes one request, and says which of its parts the status is.
fn submit(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> u16 {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    match kind {
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
    }
}

fn await_answer(guest: &mut Guest, status: u16) {
    guest.run_until("the disk answers", |guest| {
        guest.take_interrupt(0) && guest.written(0, status, 1).is_some()
    });
    assert_eq!(guest.written(0, status, 1).unwrap(), [OK]);
}

/// One request; what was read, if anything was to be.
fn request(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let status = submit(guest, kind, sector, data);
    await_answer(guest, status);
    guest.written(0, 1, SECTOR_BYTES).unwrap()
}

/// With `tracks` the backend marks what is in flight, so that more than a crash in peace is mended.
fn use_and_replace(mut program: Program, tracks: bool) {
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
    guest.run_until("it is noticed", |guest| !guest.device.is_alive());
    assert!(guest.is_quiet());
    assert_eq!(guest.status(), 15, "the driver sees nothing of it");
    if tracks {
        submit(&mut guest, WRITE, 9, &[9; SECTOR_BYTES]);
    }
    program.restart();
    guest.reconnect(&program.socket).unwrap();
    if tracks {
        await_answer(&mut guest, 2);
    } else {
        request(&mut guest, WRITE, 9, &[9; SECTOR_BYTES]);
    }
    assert_eq!(request(&mut guest, READ, 9, &[]), [9; SECTOR_BYTES]);
    assert_eq!(request(&mut guest, READ, 7, &[]), [3; SECTOR_BYTES]);
}

#[test]
fn a_disk_of_qemus_is_used_reset_killed_and_replaced() {
    qemu_storage_daemon().into_iter().for_each(|disk| use_and_replace(disk, false));
}

#[test]
fn a_disk_of_ours_is_used_reset_killed_and_replaced() {
    nacre_blk().into_iter().for_each(|disk| use_and_replace(disk, true));
}

#[test]
fn a_backend_is_told_the_drivers_view_of_the_device() {
    const SET_STATUS: u32 = 39;
    let Some(mut program) = nacre_blk() else { return };
    let line = Cut::after(usize::MAX, &program.socket);
    let backend = negotiate(DeviceConfig::new("disk", BLOCK), &line.frontend).unwrap();
    let mut guest = Guest::new(backend);
    guest.bring_up();
    request(&mut guest, WRITE, 9, &[1; SECTOR_BYTES]);
    assert_eq!(line.told(SET_STATUS), [11, 15], "features agreed upon, then the driver is ready");
    guest.bring_up();
    request(&mut guest, WRITE, 9, &[2; SECTOR_BYTES]);
    assert_eq!(line.told(SET_STATUS), [11, 15, 0, 11, 15], "after a reset");
    program.kill();
    guest.run_until("it is noticed", |guest| !guest.device.is_alive());
    program.restart();
    let line = Cut::after(usize::MAX, &program.socket);
    guest.reconnect(&line.frontend).unwrap();
    assert_eq!(line.told(SET_STATUS), [11, 15], "of the driver that its predecessor had");
}

#[test]
fn a_driver_hears_of_a_disk_that_grew_from_each_of_its_backends() {
    let Some(mut program) = nacre_blk() else { return };
    let backend = negotiate(DeviceConfig::new("disk", BLOCK), &program.socket).unwrap();
    let mut guest = Guest::new(backend);
    guest.bring_up();
    guest.write(0x10, 2, CONFIG_VECTOR.into());
    let mut sectors = SECTORS;
    for _backend in 0..3 {
        let generation = guest.read(0x15, 1);
        sectors *= 2;
        program.resize(sectors * SECTOR_BYTES as u64);
        guest.run_until("the driver hears of it", |guest| guest.take_interrupt(CONFIG_VECTOR));
        assert_eq!(guest.read(0x2000, 8), sectors);
        assert_ne!(guest.read(0x15, 1), generation);
        request(&mut guest, WRITE, sectors - 1, &[7; SECTOR_BYTES]);
        assert_eq!(request(&mut guest, READ, sectors - 1, &[]), [7; SECTOR_BYTES]);
        program.kill();
        guest.run_until("it is noticed", |guest| !guest.device.is_alive());
        assert!(guest.is_quiet(), "the channel is gone too");
        program.restart();
        guest.reconnect(&program.socket).unwrap();
        assert!(!guest.take_interrupt(CONFIG_VECTOR), "nothing is new");
    }
}

/// A backend dies after each message of the replay in turn, and a good one comes after it.
#[test]
fn a_disk_that_dies_at_any_message_of_its_start_loses_nothing() {
    let Some(mut program) = nacre_blk() else { return };
    let backend = negotiate(DeviceConfig::new("disk", BLOCK), &program.socket).unwrap();
    let mut guest = Guest::new(backend);
    guest.bring_up();
    request(&mut guest, WRITE, 9, &[0xff; SECTOR_BYTES]);
    for messages in 0.. {
        let round = u8::try_from(messages).unwrap();
        program.kill();
        guest.run_until("it is noticed", |guest| !guest.device.is_alive());
        submit(&mut guest, WRITE, 9, &[round; SECTOR_BYTES]);
        program.restart();
        let cut = Cut::after(messages, &program.socket);
        let outcome = guest.reconnect(&cut.frontend);
        assert_eq!(guest.status(), 15);
        if outcome.is_ok() {
            // It was cut off later than the last message, if at all.
            assert!(messages > 15, "{messages} messages can't be all of them");
            break;
        }
        assert_eq!(guest.device.status("").state, DeviceState::Lost);
        program.kill();
        program.restart();
        guest.reconnect(&program.socket).unwrap();
        await_answer(&mut guest, 2);
        assert_eq!(request(&mut guest, READ, 9, &[]), [round; SECTOR_BYTES]);
    }
}

/// The same for the first start, after which a crash with a request outstanding has to be mended
/// as well as ever.
#[test]
fn a_disk_that_dies_at_any_message_of_its_first_start_is_replaced_for_good() {
    let Some(mut program) = nacre_blk() else { return };
    let mut started = 0;
    for messages in 0.. {
        let round = u8::try_from(messages).unwrap();
        let cut = Cut::after(messages, &program.socket);
        let backend = negotiate(DeviceConfig::new("disk", BLOCK), &cut.frontend);
        if let Ok(backend) = backend {
            let mut guest = Guest::new(backend);
            guest.bring_up();
            guest.device.process(&guest.memory);
            if guest.device.status("").state == DeviceState::Active && messages > 20 {
                break;
            }
            started += 1;
            program.kill();
            guest.run_until("it is noticed", |guest| !guest.device.is_alive());
            for _ in 0..2 {
                submit(&mut guest, WRITE, 9, &[round; SECTOR_BYTES]);
                program.restart();
                guest.reconnect(&program.socket).unwrap();
                await_answer(&mut guest, 2);
                assert_eq!(request(&mut guest, READ, 9, &[]), [round; SECTOR_BYTES]);
                program.kill();
                guest.run_until("it is noticed", |guest| !guest.device.is_alive());
            }
        } else {
            program.kill();
        }
        program.restart();
    }
    assert!(started > 10, "only {started} messages start a disk");
}

#[test]
fn a_ring_that_the_driver_broke_is_mended_by_a_reset_and_keeps_its_backend() {
    let Some(mut program) = nacre_blk() else { return };
    let backend = negotiate(DeviceConfig::new("disk", BLOCK), &program.socket).unwrap();
    let mut guest = Guest::new(backend);
    for round in 1..=3_u8 {
        guest.bring_up();
        request(&mut guest, WRITE, 7, &[round; SECTOR_BYTES]);
        guest.break_ring(0);
        guest.run_until("the driver is told", |guest| guest.status() == 15 | NEEDS_RESET);
        assert_eq!(guest.device.status("").state, DeviceState::NeedsReset);
        assert!(guest.device.is_alive() && guest.is_quiet());
    }
    assert!(guest.device.take_loss().is_none());
    // A new backend is not given the broken ring, and never one of a driver that has reset.
    for (state, reset) in [(DeviceState::NeedsReset, true), (DeviceState::Idle, false)] {
        program.kill();
        guest.run_until("it is noticed", |guest| !guest.device.is_alive());
        program.restart();
        guest.reconnect(&program.socket).unwrap();
        assert_eq!(guest.device.status("").state, state);
        if reset {
            guest.reset();
        }
    }
    guest.bring_up();
    assert_eq!(request(&mut guest, READ, 7, &[]), [3; SECTOR_BYTES]);
}
