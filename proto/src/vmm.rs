//! The VMM's control socket: one JSON document in one `SOCK_SEQPACKET` datagram, either way.
//!
//! The supervisor sends requests, each with an id of its choice, and the VMM answers each with the
//! same id. Unasked it sends [`Event`]s; how a VM ended is its exit code, `exit::VmmExit`. The
//! supervisor's end of the socket being closed ends the VM. A request that needs a descriptor has
//! exactly one beside it (`SCM_RIGHTS`); no other datagram has any.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The longest datagram, in bytes.
pub const MAX_BYTES: usize = 64 << 10;

/// From the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Comes back in the reply.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What a supervisor may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// How the VM is; answered by [`Outcome::Status`].
    Status,
    /// End the VM at once.
    Stop,
    /// Press the guest's power button; what the guest does then is its own affair.
    PowerButton,
    /// Give this device a new backend in place of one that is lost or quiesced. Beside the request
    /// comes the new backend's socket. [`Outcome::Done`] once the backend has been told everything
    /// that its predecessor knew and serves the rings; refused, the device is as it was and the
    /// socket closed. It also says that the predecessor, and what it had asked the kernel for, has
    /// ended: a reset of the device or the VM that waits for this is then done, refused or not.
    Reconnect {
        /// The device's id.
        device: String,
    },
    /// Have the device's backend end what is in flight, keep where it stopped, and hang up.
    /// [`Outcome::Done`] once the connection is closed; the guest's requests then wait for
    /// [`Command::Reconnect`].
    Quiesce {
        /// The device's id.
        device: String,
    },
}

/// Something that the supervisor did not ask for, but has to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A device's backend hung up, hung or broke the protocol, and is cut off. The device waits for
    /// [`Command::Reconnect`].
    DeviceLost {
        /// The device's id.
        device: String,
        /// What was wrong, for a log.
        reason: String,
    },
}

/// Any datagram of the VMM's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// To a request.
    Reply(Reply),
    /// Unasked.
    Event(Event),
}

/// From the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// The request's; 0 for a datagram that is no request.
    pub id: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done, or begun where it takes time.
    Done,
    /// How the VM is.
    Status(Status),
    /// Not done, and why.
    Refused(String),
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// What its vCPUs do.
    pub state: State,
    /// How many vCPUs there are.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// How often the guest was reset in this process.
    pub resets: u64,
    /// When things happened.
    pub timing: Timing,
    /// Exits to user space since the start, all vCPUs together.
    pub exits: Exits,
    /// What KVM itself has counted, by its own names, all vCPUs together; none where the host does
    /// not give it (before Linux 5.14).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm: Option<BTreeMap<String, u64>>,
    /// The virtio devices, in the order of the command line.
    pub devices: Vec<DeviceStatus>,
}

/// How one device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStatus {
    /// Its id.
    pub id: String,
    /// Its frontend's state.
    pub state: DeviceState,
    /// How many backends came in the place of the first one.
    pub reconnects: u64,
}

/// A frontend's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// There is a backend, and no driver yet (or any more).
    Idle,
    /// The backend serves the driver's rings.
    Active,
    /// There is no backend; the driver's requests wait for one.
    Lost,
    /// The backend was asked away; the driver's requests wait for another one.
    Quiesced,
    /// The driver has to reset the device before it is of any use.
    NeedsReset,
}

/// What the vCPUs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// They run.
    Running,
    /// The VM is coming to its end.
    Ending,
}

/// Moments on the host's monotonic clock, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timing {
    /// The program began to run in its process.
    pub started_ns: u64,
    /// The vCPUs were let run for the first time: their next step is `KVM_RUN`.
    pub first_run_ns: u64,
}

/// Exits to user space by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exits {
    /// Port reads.
    pub pio_reads: u64,
    /// Port writes.
    pub pio_writes: u64,
    /// MMIO reads.
    pub mmio_reads: u64,
    /// MMIO writes.
    pub mmio_writes: u64,
    /// Signals and retries.
    pub others: u64,
}

/// Why bytes are no message, or a message no bytes.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Longer than [`MAX_BYTES`].
    #[error("a message of {0} bytes")]
    TooLong(usize),
    /// Not the document that is expected.
    #[error("not a message of this protocol")]
    Malformed(#[from] serde_json::Error),
}

/// The datagram of a message.
///
/// # Errors
///
/// Fails if it would be too long.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, MessageError> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_BYTES {
        return Err(MessageError::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// The message in a datagram.
///
/// # Errors
///
/// Fails if it is too long, no JSON, or has anything missing or unknown in it.
pub fn decode<T: DeserializeOwned>(datagram: &[u8]) -> Result<T, MessageError> {
    if datagram.len() > MAX_BYTES {
        return Err(MessageError::TooLong(datagram.len()));
    }
    Ok(serde_json::from_slice(datagram)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

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
            memory_bytes: 1 << 30,
            resets: 1,
            timing: Timing { started_ns: 1, first_run_ns: 2 },
            exits: Exits { pio_reads: 3, ..Exits::default() },
            kvm: Some(BTreeMap::from([("exits".to_owned(), 7)])),
            devices: vec![DeviceStatus {
                id: "root".to_owned(),
                state: DeviceState::Lost,
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
    fn an_event_has_the_documented_bytes() {
        let (device, reason) = ("root".to_owned(), "hung up".to_owned());
        let event = Told::Event(Event::DeviceLost { device, reason });
        let text = &br#"{"event":{"device-lost":{"device":"root","reason":"hung up"}}}"#[..];
        assert_eq!(encode(&event).unwrap(), text);
        assert_eq!(decode::<Told>(text).unwrap(), event);
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
}
