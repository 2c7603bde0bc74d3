//! Backends that are lost, asked away and replaced.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use core_vmm::virtio::frontend::{Limits, ReconnectError};
use core_vmm::virtio::{DeviceConfig, RequestError};
use nacre_proto::vmm::DeviceState;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::echo::{Backend, Hang, Manner};
use crate::guest::Guest;
use crate::{config, guest_with, negotiate};

fn lose(guest: &mut Guest, backend: Backend) {
    backend.end();
    guest.run_until("it is noticed", |guest| !guest.device.is_alive());
}

fn state(guest: &Guest) -> DeviceState {
    guest.device.status("").state
}

#[test]
fn the_guest_sees_nothing_of_a_backend_that_hangs_up_and_another_takes_over() {
    let (mut guest, mut backend) = guest_with(Manner::default());
    assert_eq!(state(&guest), DeviceState::Idle);
    guest.bring_up();
    assert_eq!(guest.request(0, b"alive"), b"ALIVE");
    assert_eq!(state(&guest), DeviceState::Active);
    for round in 1..=3 {
        lose(&mut guest, backend);
        assert_eq!((state(&guest), guest.status()), (DeviceState::Lost, 15));
        assert!(guest.device.take_loss().is_some_and(|reason| reason.contains("hung up")));
        assert!(guest.device.take_loss().is_none(), "it is told once");
        assert!(guest.is_quiet(), "a closed socket does not keep the control loop busy");
        backend = Backend::start(Manner::default());
        guest.reconnect(&backend.socket).unwrap();
        assert_eq!(guest.device.status("").reconnects, round);
        assert_eq!(guest.request(0, b"alive"), b"ALIVE");
        assert_eq!(guest.request(1, b"all of it"), b"ALL OF IT");
    }
}

#[test]
fn a_backend_is_asked_away_and_what_is_asked_meanwhile_waits_for_the_next() {
    let (mut guest, _first) = guest_with(Manner::default());
    guest.bring_up();
    for _ in 0..3 {
        assert_eq!(guest.request(0, b"before"), b"BEFORE");
        guest.device.quiesce().unwrap();
        assert_eq!(state(&guest), DeviceState::Quiesced);
        assert!(matches!(guest.device.quiesce(), Err(RequestError::Absent)));
        guest.submit(0, b"meanwhile");
        assert!(guest.is_quiet() && guest.answer(0, 9).is_none());
        let next = Backend::start(Manner::default());
        guest.reconnect(&next.socket).unwrap();
        guest.run_until("it is answered", |guest| guest.answer(0, 9).is_some());
        assert_eq!(guest.answer(0, 9).unwrap(), b"MEANWHILE");
    }
    let unwanted = Backend::start(Manner::default());
    assert!(matches!(guest.reconnect(&unwanted.socket), Err(RequestError::Served)));
    assert_eq!(guest.request(1, b"still"), b"STILL");
}

#[test]
fn a_driver_that_comes_while_there_is_no_backend_is_served_by_the_next() {
    let (mut guest, backend) = guest_with(Manner::default());
    lose(&mut guest, backend);
    assert_eq!(guest.status(), 0);
    guest.bring_up();
    guest.submit(0, b"early");
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    assert_eq!(state(&guest), DeviceState::Active);
    guest.run_until("it is answered", |guest| guest.answer(0, 5).is_some());
}

#[test]
fn a_reset_while_the_backend_is_asked_away_is_done_at_once_and_nothing_of_the_driver_comes_back() {
    let (mut guest, _first) = guest_with(Manner::default());
    guest.bring_up();
    assert_eq!(guest.request(0, b"one"), b"ONE");
    guest.device.quiesce().unwrap();
    guest.submit(0, b"never");
    guest.reset();
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    assert_eq!(state(&guest), DeviceState::Idle);
    guest.bring_up();
    assert_eq!(guest.request(0, b"two"), b"TWO");
    guest.device.quiesce().unwrap();
    guest.device.reset();
    assert!(guest.device.is_still());
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_reset_while_the_backend_is_lost_waits_for_the_supervisors_word_that_it_has_ended() {
    let (mut guest, backend) = guest_with(Manner::default());
    guest.bring_up();
    assert_eq!(guest.request(0, b"one"), b"ONE");
    lose(&mut guest, backend);
    guest.submit(0, b"never");
    guest.write(0x14, 1, 0);
    guest.device.process(&guest.memory);
    assert!(guest.status() != 0 && !guest.device.is_still());
    assert!(guest.is_quiet());
    // The word counts, whatever the new backend is worth.
    let (silent, peer) = UnixStream::pair().unwrap();
    drop(peer);
    guest.reconnect(&silent).unwrap_err();
    assert_eq!((guest.status(), state(&guest)), (0, DeviceState::Lost));
    guest.bring_up();
    guest.submit(0, b"two");
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    guest.run_until("it is answered", |guest| guest.answer(0, 3).is_some());
    assert_eq!(guest.answer(0, 3).unwrap(), b"TWO");
    lose(&mut guest, next);
    guest.device.reset();
    assert!(!guest.device.is_still(), "the VM may not run yet");
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    assert!(guest.device.is_still());
    assert_eq!(state(&guest), DeviceState::Idle);
}

#[test]
fn a_crash_with_requests_outstanding_is_not_guessed_away() {
    let (mut guest, backend) = guest_with(Manner::default());
    guest.bring_up();
    assert_eq!(guest.request(0, b"kept"), b"KEPT");
    lose(&mut guest, backend);
    guest.submit(0, b"lost?");
    let next = Backend::start(Manner::default());
    let refused = guest.reconnect(&next.socket).unwrap_err();
    assert!(matches!(refused, RequestError::Reconnect(ReconnectError::Base(_))), "{refused}");
    assert_eq!(state(&guest), DeviceState::Lost);
    guest.bring_up();
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    assert_eq!(guest.request(0, b"mended"), b"MENDED");
}

#[test]
fn a_backend_that_is_not_what_the_guest_knows_is_refused() {
    let (mut guest, backend) = guest_with(Manner::default());
    guest.bring_up();
    assert_eq!(guest.request(0, b"the first"), b"THE FIRST");
    lose(&mut guest, backend);
    let usual = Manner::default();
    let fewer = usual.features & !(1 << 5);
    let poorer = usual.protocol - VhostUserProtocolFeatures::CONFIG;
    for (manner, words) in [
        (Manner { features: fewer, ..usual.clone() }, "features 0x20"),
        (Manner { protocol: poorer, ..usual.clone() }, "protocol features 0x200"),
        (Manner { queues: 1, ..usual.clone() }, "2 queues"),
        (Manner { config: *b"echo9876", ..usual.clone() }, "another device"),
    ] {
        let next = Backend::start(manner);
        let refused = guest.reconnect(&next.socket).unwrap_err();
        assert!(core_vmm::error_chain(&refused).contains(words), "{refused}");
        assert_eq!(state(&guest), DeviceState::Lost);
    }
    let next = Backend::start(usual);
    guest.reconnect(&next.socket).unwrap();
    assert_eq!(guest.request(0, b"this one"), b"THIS ONE");
}

#[test]
fn what_the_driver_wrote_to_the_configuration_is_told_to_the_next_backend() {
    let (mut guest, backend) = guest_with(Manner::default());
    guest.bring_up();
    guest.write(0x2000, 1, b'E'.into());
    guest.run_until("it is told", |guest| guest.is_quiet());
    lose(&mut guest, backend);
    guest.write(0x2001, 1, b'C'.into());
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    assert_eq!(guest.read(0x2000, 8).to_le_bytes(), *b"ECho0123");
    lose(&mut guest, next);
    guest.write(0x14, 1, 0);
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.read(0x2000, 8).to_le_bytes(), *b"echo0123", "that driver is gone");
}

fn impatient() -> DeviceConfig {
    let short = Duration::from_millis(50);
    let limits = Limits { converse: short, reconnect: short, ..Limits::default() };
    DeviceConfig { limits, ..config() }
}

#[test]
fn a_new_backend_that_hangs_is_refused_in_time() {
    let backend = Backend::start(Manner::default());
    let mut guest = Guest::new(negotiate(impatient(), &backend.socket).unwrap());
    guest.bring_up();
    guest.run_until("it serves", |guest| state(guest) == DeviceState::Active);
    lose(&mut guest, backend);
    let (silent, _peer) = UnixStream::pair().unwrap();
    let started = Instant::now();
    let refused = guest.reconnect(&silent).unwrap_err();
    assert!(core_vmm::error_chain(&refused).contains("within 50 ms"), "{refused}");
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(state(&guest), DeviceState::Lost);
    assert!(guest.device.is_still(), "it was never told of any memory");
}

#[test]
fn a_reset_waits_until_a_backend_that_was_cut_off_has_ended() {
    let hang = Arc::<Hang>::default();
    let backend = Backend::start(Manner { hangs: Some(Arc::clone(&hang)), ..Manner::default() });
    let mut guest = Guest::new(negotiate(impatient(), &backend.socket).unwrap());
    let started = Instant::now();
    guest.bring_up();
    guest.run_until("it is cut off", |guest| !guest.device.is_alive());
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(guest.status(), 15, "the driver waits");
    guest.write(0x14, 1, 0);
    guest.device.process(&guest.memory);
    assert!(guest.status() != 0 && !guest.device.is_still(), "it may still write");
    assert!(guest.is_quiet());
    hang.end();
    let next = Backend::start(Manner::default());
    guest.reconnect(&next.socket).unwrap();
    assert_eq!((guest.status(), state(&guest)), (0, DeviceState::Idle));
    guest.bring_up();
    assert_eq!(guest.request(0, b"anew"), b"ANEW");
}
