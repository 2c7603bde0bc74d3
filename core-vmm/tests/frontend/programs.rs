//! The frontend against our other backends, as far as a driver in a few lines gets.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use core_vmm::virtio::{DeviceConfig, DeviceKind};

use crate::guest::Guest;
use crate::negotiate;
use crate::program::{Program, built};

const FUSE_INIT: u32 = 26;

fn arguments(list: &[&str], socket: &Path) -> Vec<OsString> {
    let rest = ["--socket-path".into(), socket.into()];
    list.iter().map(OsString::from).chain(rest).collect()
}

#[test]
fn a_file_system_of_ours_answers_its_first_request_after_each_reset() {
    let program = Program::start(&built("nacre-fs"), |share, socket| {
        fs::create_dir(share).unwrap();
        let share = share.to_str().unwrap();
        arguments(&["--shared-dir", share, "--tag", "share", "--sandbox", "none"], socket)
    });
    let Some(program) = program else { return };
    let backend = negotiate(DeviceConfig::new("fs", DeviceKind(26)), &program.socket).unwrap();
    let mut guest = Guest::new(backend);
    for _ in 0..3 {
        guest.bring_up();
        assert_eq!(guest.read(0x2000, 8).to_le_bytes(), *b"share\0\0\0", "the tag");
        let mut header = [0_u8; 40];
        header[..4].copy_from_slice(&104_u32.to_le_bytes());
        header[4..8].copy_from_slice(&FUSE_INIT.to_le_bytes());
        header[8] = 1;
        let mut init = [0_u8; 64];
        init[0] = 7;
        init[4] = 38;
        guest.submit_parts(1, &[&header, &init], &[16, 64]);
        guest.run_until("the file system answers", |guest| {
            guest.take_interrupt(1) && guest.written(1, 2, 16).is_some()
        });
        let answer = guest.written(1, 2, 16).unwrap();
        assert_eq!(answer[4..8], [0; 4], "no error");
        assert_eq!(guest.written(1, 3, 4).unwrap(), [7, 0, 0, 0], "FUSE's major version");
    }
}

#[test]
fn a_socket_device_of_ours_refuses_a_connection_to_nobody() {
    let program = Program::start(&built("nacre-vsock"), |path, socket| {
        let path = path.to_str().unwrap();
        arguments(&["--guest-cid", "5", "--uds-path", path], socket)
    });
    let Some(program) = program else { return };
    let backend = negotiate(DeviceConfig::new("vsock", DeviceKind(19)), &program.socket).unwrap();
    let mut guest = Guest::new(backend);
    for _ in 0..3 {
        guest.bring_up();
        assert_eq!(guest.read(0x12, 2), 3, "receive, transmit and event queue");
        assert_eq!(guest.read(0x2000, 8), 5, "the guest's context id");
        guest.submit_parts(0, &[], &[4096]);
        // From 5:1000 to 2:99, a stream (virtio 1.3, section 5.10.6): a request to connect.
        let mut packet = [0_u8; 44];
        packet[0] = 5;
        packet[8] = 2;
        packet[16..20].copy_from_slice(&1000_u32.to_le_bytes());
        packet[20] = 99;
        packet[28] = 1;
        packet[30] = 1;
        guest.submit_parts(1, &[&packet], &[]);
        guest.run_until("the refusal comes", |guest| {
            guest.take_interrupt(0) && guest.written(0, 0, 44).is_some()
        });
        let answer = guest.written(0, 0, 44).unwrap();
        assert_eq!((answer[0], answer[8], answer[30]), (2, 5, 3), "a reset from 2 to 5");
    }
}
