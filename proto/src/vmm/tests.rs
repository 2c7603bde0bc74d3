//! The bytes of each message, and that no others are taken.

use proptest::prelude::proptest;

use super::*;

fn disk() -> NewDevice {
    let kind =
        NewDeviceKind::Virtio { device_type: 2, queues: None, queue_size: Some(128), config: None };
    NewDevice { id: "d".to_owned(), kind }
}

#[test]
fn requests_have_the_documented_bytes() {
    for (command, text) in [
        (Command::Status, &br#"{"id":7,"command":"status"}"#[..]),
        (Command::Stop, br#"{"id":7,"command":"stop"}"#),
        (Command::PowerButton, br#"{"id":7,"command":"power-button"}"#),
        (
            Command::Reconnect { device: "root".to_owned() },
            br#"{"id":7,"command":{"reconnect":{"device":"root"}}}"#,
        ),
        (
            Command::Quiesce { device: "root".to_owned() },
            br#"{"id":7,"command":{"quiesce":{"device":"root"}}}"#,
        ),
        (Command::SetCpus { cpus: 3 }, br#"{"id":7,"command":{"set-cpus":{"cpus":3}}}"#),
        (
            Command::SetMemory { bytes: 1 << 30 },
            br#"{"id":7,"command":{"set-memory":{"bytes":1073741824}}}"#,
        ),
        (
            Command::AddDevice { device: disk() },
            br#"{"id":7,"command":{"add-device":{"device":{"id":"d","kind":{"virtio":{"device_type":2,"queues":null,"queue_size":128,"config":null}}}}}}"#,
        ),
        (
            Command::AddDevice {
                device: NewDevice {
                    id: "v".to_owned(),
                    kind: NewDeviceKind::Vfio { address: "0000:01:00.0".to_owned() },
                },
            },
            br#"{"id":7,"command":{"add-device":{"device":{"id":"v","kind":{"vfio":{"address":"0000:01:00.0"}}}}}}"#,
        ),
        (
            Command::RemoveDevice { device: "d".to_owned() },
            br#"{"id":7,"command":{"remove-device":{"device":"d"}}}"#,
        ),
    ] {
        let request = Request { id: 7, command };
        assert_eq!(encode(&request).unwrap(), text);
        assert_eq!(decode::<Request>(text).unwrap(), request);
    }
}

#[test]
fn a_status_reply_comes_back_as_it_was() {
    let status = Status {
        state: State::Running,
        cpus: 4,
        max_cpus: 8,
        memory_bytes: 1 << 30,
        max_memory_bytes: 1 << 31,
        resets: 1,
        timing: Timing { started_ns: 1, first_run_ns: 2 },
        exits: Exits { pio_reads: 3, ..Exits::default() },
        kvm: Some(BTreeMap::from([("exits".to_owned(), 7)])),
        devices: vec![DeviceStatus {
            id: "root".to_owned(),
            address: "0000:00:01.0".to_owned(),
            state: DeviceState::Lost,
            leaving: false,
            reconnects: 2,
        }],
    };
    let reply = Told::Reply(Reply { id: 1, outcome: Outcome::Status(status) });
    assert_eq!(decode::<Told>(&encode(&reply).unwrap()).unwrap(), reply);
    let refused = Told::Reply(Reply { id: 2, outcome: Outcome::Refused("no".to_owned()) });
    let text = &br#"{"reply":{"id":2,"outcome":{"refused":"no"}}}"#[..];
    assert_eq!(encode(&refused).unwrap(), text);
}

#[test]
fn events_have_the_documented_bytes() {
    let device = || "root".to_owned();
    let reason = || "why".to_owned();
    for (event, text) in [
        (
            Event::DeviceLost { device: device(), reason: reason() },
            r#"{"device-lost":{"device":"root","reason":"why"}}"#,
        ),
        (Event::DeviceRemoved { device: device() }, r#"{"device-removed":{"device":"root"}}"#),
        (
            Event::DeviceKept { device: device(), reason: reason() },
            r#"{"device-kept":{"device":"root","reason":"why"}}"#,
        ),
        (Event::CpusChanged { cpus: 2 }, r#"{"cpus-changed":{"cpus":2}}"#),
        (Event::MemoryChanged { bytes: 4096 }, r#"{"memory-changed":{"bytes":4096}}"#),
        (
            Event::Declined { what: Resource::Memory, reason: reason() },
            r#"{"declined":{"what":"memory","reason":"why"}}"#,
        ),
    ] {
        let event = Told::Event(event);
        let text = format!(r#"{{"event":{text}}}"#);
        assert_eq!(encode(&event).unwrap(), text.as_bytes());
        assert_eq!(decode::<Told>(text.as_bytes()).unwrap(), event);
    }
}

#[test]
fn an_added_device_is_told_with_its_place() {
    let outcome = Outcome::Added { address: "0000:00:05.0".to_owned() };
    let reply = Told::Reply(Reply { id: 3, outcome });
    let text = &br#"{"reply":{"id":3,"outcome":{"added":{"address":"0000:00:05.0"}}}}"#[..];
    assert_eq!(encode(&reply).unwrap(), text);
    assert_eq!(decode::<Told>(text).unwrap(), reply);
}

#[test]
fn unknown_and_missing_things_are_refused() {
    for text in [
        &br#"{"id":1,"command":"fly"}"#[..],
        br#"{"id":1,"command":"stop","force":true}"#,
        br#"{"command":"stop"}"#,
        br#"{"id":-1,"command":"stop"}"#,
        br#"{"id":1,"command":"stop"} x"#,
        b"",
    ] {
        assert!(decode::<Request>(text).is_err(), "{}", String::from_utf8_lossy(text));
    }
    let long = vec![b' '; MAX_BYTES + 1];
    assert!(matches!(decode::<Request>(&long), Err(MessageError::TooLong(_))));
}

proptest! {
    #[test]
    fn any_datagram_is_decoded_or_refused_without_panic(bytes: Vec<u8>) {
        decode::<Request>(&bytes).ok();
        decode::<Told>(&bytes).ok();
    }
}
