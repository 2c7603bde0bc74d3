//! The frontend on a real socket, against `vhost-user-backend`: an implementation of the protocol
//! that is not ours. No KVM: the guest's side is played through the bus.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, in its parts too, and says why it is skipped"
)]

mod cut;
mod disk;
mod echo;
mod guest;
mod program;
mod programs;
mod replaced;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use core_vmm::virtio::frontend::Limits;
use core_vmm::virtio::{
    DeviceConfig, DeviceKind, FrontendError, Negotiated, Watchdog, connect, connect_all,
};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::echo::{Backend, Manner, PROTOCOL_FEATURES, VERSION_1};
use crate::guest::{CONFIG_VECTOR, Guest};

const NEEDS_RESET: u64 = 64;

/// A type with eight bytes of configuration.
const VSOCK: DeviceKind = DeviceKind(19);

fn config() -> DeviceConfig {
    DeviceConfig::new("echo", VSOCK)
}

fn negotiate(config: DeviceConfig, socket: &UnixStream) -> Result<Negotiated, FrontendError> {
    connect(config, socket.try_clone().unwrap(), &Watchdog::start(|| Ok(())).unwrap())
}

fn guest_with(manner: Manner) -> (Guest, Backend) {
    let backend = Backend::start(manner);
    (Guest::new(negotiate(config(), &backend.socket).unwrap()), backend)
}

#[test]
fn a_driver_finds_the_device_and_gets_its_buffers_back() {
    let (mut guest, backend) = guest_with(Manner::default());
    assert_eq!(guest.config(0, 4), 0x1053_1af4);
    guest.bring_up();
    assert_eq!(guest.read(0x12, 2), 2, "two queues");
    assert_eq!(guest.read(0x2000, 8).to_le_bytes(), *b"echo0123");
    assert_eq!(guest.request(0, b"hello"), b"HELLO");
    assert_eq!(guest.request(1, b"queues"), b"QUEUES");
    assert_eq!(guest.request(0, b"again"), b"AGAIN");
    let features = backend.seen.features.lock().unwrap();
    let expected = VERSION_1 | PROTOCOL_FEATURES | 1 << 5;
    assert_eq!(*features, [expected], "no packed ring, and the protocol's own bit is back");
}

#[test]
fn a_ring_that_the_driver_filled_before_it_was_ready_is_served() {
    let (mut guest, _backend) = guest_with(Manner::default());
    guest.acknowledge();
    guest.set_up_queue(0, 0x1_0000);
    guest.submit(0, b"early");
    guest.write(0x14, 1, 15);
    guest.run_until("the request is answered", |guest| guest.answer(0, 5).is_some());
    assert_eq!(guest.answer(0, 5).unwrap(), b"EARLY");
}

#[test]
fn a_reset_by_the_guest_keeps_the_connection_and_the_device_works_again() {
    let (mut guest, backend) = guest_with(Manner::default());
    for round in 1..=3 {
        guest.bring_up();
        assert_eq!(guest.request(0, b"round"), b"ROUND");
        assert_eq!(guest.request(1, b"and"), b"AND");
        guest.reset();
        assert_eq!(backend.seen.resets.load(Ordering::Relaxed), round);
    }
}

#[test]
fn a_backend_that_can_only_stop_its_rings_is_reset_too() {
    let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG;
    let (mut guest, _backend) = guest_with(Manner { protocol, ..Manner::default() });
    for _ in 0..3 {
        guest.bring_up();
        assert_eq!(guest.request(0, b"round"), b"ROUND");
    }
}

#[test]
fn a_reset_of_the_vm_makes_everything_new() {
    let (mut guest, _backend) = guest_with(Manner::default());
    guest.bring_up();
    assert_eq!(guest.request(0, b"one"), b"ONE");
    guest.device.reset();
    guest.bus.reset();
    assert!(guest.chip.doorbells.lock().unwrap().is_empty());
    guest.set_config(4, &[6, 0]);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.read(0x4000 + 12, 4), 1, "vectors are masked");
    guest.set_config(0x42, &[0, 0x80]);
    for vector in 0..3 {
        guest.set_vector_masked(vector, false);
    }
    guest.bring_up();
    assert_eq!(guest.request(0, b"two"), b"TWO");
}

#[test]
fn the_doorbells_follow_the_bar() {
    let (guest, _backend) = guest_with(Manner::default());
    assert_eq!(*guest.chip.doorbells.lock().unwrap(), [0xc000_3000, 0xc000_3004]);
    guest.set_config(0x10, &0xc100_0000_u32.to_le_bytes());
    assert_eq!(*guest.chip.doorbells.lock().unwrap(), [0xc100_3000, 0xc100_3004]);
    guest.set_config(4, &[0, 0]);
    assert!(guest.chip.doorbells.lock().unwrap().is_empty());
}

#[test]
fn a_masked_interrupt_is_pending_and_comes_when_it_is_unmasked() {
    let (mut guest, _backend) = guest_with(Manner::default());
    guest.bring_up();
    guest.set_vector_masked(0, true);
    guest.submit(0, b"quiet");
    guest.run_until("it shows as pending", |guest| guest.is_pending(0));
    assert!(!guest.take_interrupt(0));
    guest.set_vector_masked(0, false);
    assert!(guest.take_interrupt(0));
    assert!(!guest.is_pending(0));
}

#[test]
fn a_queue_may_change_its_vector_while_it_runs() {
    let (mut guest, _backend) = guest_with(Manner::default());
    guest.bring_up();
    guest.write(0x16, 2, 1);
    guest.write(0x1a, 2, 0xffff);
    guest.submit(1, b"silent");
    guest.run_until("the request is answered", |guest| guest.answer(1, 6).is_some());
    guest.write(0x16, 2, 0);
    guest.write(0x1a, 2, 1);
    assert_eq!(guest.read(0x1a, 2), 1);
    guest.submit(0, b"moved");
    guest.run_until("the other vector fires", |guest| guest.take_interrupt(1));
    assert!(!guest.take_interrupt(0));
}

#[test]
fn a_write_to_the_configuration_reaches_the_backend_and_what_it_made_of_it_comes_back() {
    let (mut guest, _backend) = guest_with(Manner::default());
    guest.bring_up();
    let generation = guest.read(0x15, 1);
    guest.write(0x2000, 1, b'E'.into());
    assert_eq!(guest.read(0x2000, 1), u64::from(b'E'), "at once, from the cache");
    guest.write(0x2004, 1, b'?'.into());
    guest.run_until("the backend's word comes back", |guest| guest.take_interrupt(CONFIG_VECTOR));
    assert_eq!(guest.read(0x2000, 8).to_le_bytes(), *b"Echo0123");
    assert_ne!(guest.read(0x15, 1), generation);
}

#[test]
fn registers_are_reached_by_configuration_space_too() {
    let (mut guest, _backend) = guest_with(Manner::default());
    guest.bring_up();
    // The last capability of the list.
    let mut at = guest.config(0x34, 1);
    while guest.config(at + 1, 1) != 0 {
        at = guest.config(at + 1, 1);
    }
    assert_eq!(guest.config(at + 3, 1), 5);
    let window = |guest: &Guest, offset: u32, len: u32| {
        guest.set_config(at + 8, &offset.to_le_bytes());
        guest.set_config(at + 12, &len.to_le_bytes());
    };
    window(&guest, 0x2000, 4);
    assert_eq!(guest.config(at + 16, 4).to_le_bytes(), *b"echo\0\0\0\0");
    window(&guest, 0x16, 2);
    guest.set_config(at + 16, &[1, 0]);
    assert_eq!(guest.read(0x16, 2), 1);
    for (offset, len) in [(0xffff_fffc, 4), (0x10000, 1), (0x14, 3), (1, 2), (0, 0)] {
        window(&guest, offset, len);
        guest.config(at + 16, 4);
        guest.set_config(at + 16, &[0; 4]);
    }
    assert_eq!(guest.status(), 15);
}

#[test]
fn a_backend_that_speaks_unasked_is_given_up() {
    let (mut guest, peer) = {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || answer_handshake(theirs));
        let config = DeviceConfig { queues: Some(1), ..DeviceConfig::new("odd", DeviceKind(4)) };
        (Guest::new(negotiate(config, &ours).unwrap()), thread.join().unwrap())
    };
    (&peer).write_all(b"by the way").unwrap();
    guest.run_until("it is given up", |guest| !guest.device.is_alive());
    assert!(guest.is_quiet());
}

/// Answers one GET_FEATURES with VERSION_1 alone.
fn answer_handshake(mut peer: UnixStream) -> UnixStream {
    use std::io::Read;
    let mut set_owner_and_get_features = [0; 24];
    peer.read_exact(&mut set_owner_and_get_features).unwrap();
    let mut reply = Vec::new();
    for word in [1_u32, 1 | 4, 8] {
        reply.extend(word.to_le_bytes());
    }
    reply.extend(VERSION_1.to_le_bytes());
    peer.write_all(&reply).unwrap();
    peer
}

#[test]
fn a_backend_without_configuration_gets_it_from_the_supervisor() {
    let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    let backend = Backend::start(Manner { protocol, ..Manner::default() });
    let bytes = b"from above".to_vec();
    let config = DeviceConfig { config_bytes: Some(bytes), ..config() };
    let mut guest = Guest::new(negotiate(config, &backend.socket).unwrap());
    guest.bring_up();
    assert_eq!(guest.read(0x2000, 8).to_le_bytes(), *b"from abo");
    guest.write(0x2000, 1, 0);
    assert_eq!(guest.read(0x2000, 1), u64::from(b'f'), "there is nobody to take a write");
    assert_eq!(guest.request(0, b"still"), b"STILL");
}

#[test]
fn a_backend_without_protocol_features_is_served_as_well() {
    let manner = Manner { features: VERSION_1, ..Manner::default() };
    let backend = Backend::start(manner);
    let config = DeviceConfig { queues: Some(2), config_bytes: Some(vec![7; 8]), ..config() };
    let mut guest = Guest::new(negotiate(config, &backend.socket).unwrap());
    guest.bring_up();
    assert_eq!(guest.request(1, b"plain"), b"PLAIN");
    guest.bring_up();
    assert_eq!(guest.request(0, b"plain"), b"PLAIN");
}

#[test]
fn a_backend_that_never_answers_is_given_up_in_time() {
    let (ours, _silent) = UnixStream::pair().unwrap();
    let limits = Limits { negotiate: Duration::from_millis(50), ..Limits::default() };
    let started = Instant::now();
    let error = negotiate(DeviceConfig { limits, ..config() }, &ours).unwrap_err();
    assert!(matches!(error, FrontendError::Hung { limit_ms: 50, .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_backend_that_hangs_up_during_the_handshake_is_an_error_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = negotiate(config(), &ours).unwrap_err();
    assert!(matches!(error, FrontendError::Conversation { .. }), "{error}");
}

#[test]
fn queues_outside_memory_are_the_drivers_fault_and_a_reset_mends_it() {
    let (mut guest, _backend) = guest_with(Manner::default());
    for descriptors in [0xf_fff0, 0x1_0000_0000, !15, 8] {
        guest.acknowledge();
        guest.set_up_queue(0, descriptors);
        guest.write(0x14, 1, 15);
        guest.run_until("the driver is told", |guest| guest.take_interrupt(CONFIG_VECTOR));
        assert_eq!(guest.status(), 15 | NEEDS_RESET);
        assert!(guest.device.is_alive());
    }
    guest.bring_up();
    assert_eq!(guest.request(0, b"mended"), b"MENDED");
}

#[test]
fn devices_connect_side_by_side_and_the_one_that_fails_is_named() {
    let device = |id: &str, socket: &UnixStream| {
        (DeviceConfig { id: id.to_owned(), ..config() }, socket.try_clone().unwrap())
    };
    let watchdog = Watchdog::start(|| Ok(())).unwrap();
    let backends = [0, 1, 2].map(|_| Backend::start(Manner::default()));
    let all = backends.iter().zip(["a", "b", "c"]).map(|(b, id)| device(id, &b.socket));
    let connected = connect_all(all.collect(), &watchdog).unwrap();
    let ids: Vec<_> = connected.iter().map(|backend| backend.kept().config.id.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    // Each has a socket of its own: one that is given up is shut down.
    let silent = [0, 1].map(|_| UnixStream::pair().unwrap());
    let limits = Limits { negotiate: Duration::from_millis(50), ..Limits::default() };
    let slow = |id, (socket, _peer): &(UnixStream, UnixStream)| {
        let (config, socket) = device(id, socket);
        (DeviceConfig { limits, ..config }, socket)
    };
    let good = Backend::start(Manner::default());
    let devices =
        vec![device("good", &good.socket), slow("hung", &silent[0]), slow("hung too", &silent[1])];
    let error = connect_all(devices, &watchdog).unwrap_err();
    assert_eq!(error.id, "hung");
    assert!(matches!(error.source, FrontendError::Hung { .. }), "{error}");
}

#[test]
fn a_backend_of_the_legacy_kind_is_refused() {
    let manner = Manner { features: PROTOCOL_FEATURES, ..Manner::default() };
    let backend = Backend::start(manner);
    let error = negotiate(config(), &backend.socket).unwrap_err();
    assert!(matches!(error, FrontendError::NoVersion1 { .. }), "{error}");
}

#[test]
fn what_makes_no_sense_is_refused_before_the_backend_is_asked() {
    let (ours, _peer) = UnixStream::pair().unwrap();
    for size in [0, 3, 0xffff] {
        let error = negotiate(DeviceConfig { queue_size: size, ..config() }, &ours).unwrap_err();
        assert!(matches!(error, FrontendError::QueueSize { .. }), "{error}");
    }
    let long = DeviceConfig { config_bytes: Some(vec![0; 257]), ..config() };
    let error = negotiate(long, &ours).unwrap_err();
    assert!(matches!(error, FrontendError::ConfigLength { len_bytes: 257 }), "{error}");
}
