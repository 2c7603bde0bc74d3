//! The VMM's control socket: one JSON document in one `SOCK_SEQPACKET` datagram, either way.
//!
//! The supervisor sends requests, each with an id of its choice, and the VMM answers each with the
//! same id. Unasked it sends [`Event`]s; how a VM ended is its exit code, `exit::VmmExit`. The
//! supervisor's end of the socket being closed ends the VM. A request that needs descriptors has
//! exactly those beside it (`SCM_RIGHTS`); no other datagram has any.
//!
//! What takes the guest's part is answered when it has begun: the guest was told. What the guest
//! makes of it comes as an event, maybe never: a guest need not listen.

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
    /// Have so many vCPUs, from 1 to [`Status::max_cpus`]. [`Outcome::Done`] once the guest was
    /// told. Those that are added are there from then on, and it is the guest's to use them;
    /// those that are to go are there until the guest has ejected them ([`Event::CpusChanged`]).
    SetCpus {
        /// How many.
        cpus: u32,
    },
    /// Have so much RAM, from what the VM began with to [`Status::max_memory_bytes`], in steps of
    /// [`MEMORY_STEP_BYTES`]. [`Outcome::Done`] once the guest was told. What is added is there
    /// from then on; what is to go is there until the guest has ejected it
    /// ([`Event::MemoryChanged`]).
    SetMemory {
        /// RAM in bytes, all together.
        bytes: u64,
    },
    /// Put a device on the bus. [`Outcome::Added`] once the guest was told.
    AddDevice {
        /// What and how. How many descriptors come with it, and which, stands at its kind.
        device: NewDevice,
    },
    /// Have the guest give a device up. [`Outcome::Done`] once it was told; the device works until
    /// the guest has ejected it ([`Event::DeviceRemoved`]) or says that it will not
    /// ([`Event::DeviceKept`]). A reset of the guest ends the wait: the device is gone then.
    /// For a device that is lost it also says, as [`Command::Reconnect`] does, that what served it, and
    /// what that had asked the kernel for, has ended.
    RemoveDevice {
        /// The device's id.
        device: String,
    },
}

/// RAM is added and removed in multiples of this: Linux takes no smaller block of memory, and
/// reports one that is not aligned to it as added although it is of no use.
pub const MEMORY_STEP_BYTES: u64 = 128 << 20;

/// A device that is to be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDevice {
    /// The supervisor's name for it, which no other device has.
    pub id: String,
    /// What it is.
    pub kind: NewDeviceKind,
}

/// What kind of device is to be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum NewDeviceKind {
    /// A virtio device in a process of its own. One descriptor: the backend's connected socket.
    Virtio {
        /// The virtio device type (virtio 1.3, chapter 5).
        device_type: u16,
        /// How many queues, where the backend does not say.
        queues: Option<u16>,
        /// The size of each queue; the VMM has a default.
        queue_size: Option<u16>,
        /// The configuration space, where the backend has none to give.
        config: Option<Vec<u8>>,
    },
    /// A device of the host's. Three descriptors, in this order: its VFIO container, its group,
    /// the device itself; they belong together already.
    Vfio {
        /// Its address on the host, such as `0000:01:00.0`; for messages.
        address: String,
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
    /// The guest has ejected a device, or was reset while it was to do so. The device is gone, and
    /// its backend's connection is closed.
    DeviceRemoved {
        /// The device's id.
        device: String,
    },
    /// The guest will not eject a device, which stays as it was.
    DeviceKept {
        /// The device's id.
        device: String,
        /// What the guest said, for a log.
        reason: String,
    },
    /// The guest has ejected vCPUs.
    CpusChanged {
        /// How many there are now.
        cpus: u32,
    },
    /// The guest has ejected RAM.
    MemoryChanged {
        /// How much there is now, in bytes.
        bytes: u64,
    },
    /// The guest can't use RAM or vCPUs that were added, or will not give up what is to go. What is
    /// to go stays, and the wait for it has ended.
    Declined {
        /// Of what.
        what: Resource,
        /// What the guest said, for a log.
        reason: String,
    },
}

/// What a guest has more or less of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resource {
    /// vCPUs.
    Cpus,
    /// RAM.
    Memory,
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
    /// A device was added.
    Added {
        /// Where the guest finds it, such as `0000:00:05.0`.
        address: String,
    },
    /// Not done, and why.
    Refused(String),
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// What its vCPUs do.
    pub state: State,
    /// How many vCPUs there are, with those that are to go.
    pub cpus: u32,
    /// How many there can be.
    pub max_cpus: u32,
    /// RAM in bytes, with what is to go.
    pub memory_bytes: u64,
    /// How much there can be.
    pub max_memory_bytes: u64,
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
    /// The devices: those of the command line in its order, then those that were added.
    pub devices: Vec<DeviceStatus>,
}

/// How one device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStatus {
    /// Its id.
    pub id: String,
    /// Where the guest finds it, such as `0000:00:05.0`.
    pub address: String,
    /// Its frontend's state.
    pub state: DeviceState,
    /// Whether the guest was asked to eject it.
    pub leaving: bool,
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
    /// A device of the host's; no process of ours serves it.
    Passthrough,
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
mod tests;
