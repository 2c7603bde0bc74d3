//! The vhost-user frontend: a conversation with one backend, as a chain of types.
//!
//! ```text
//! Connected --negotiate--> Negotiated --start--> Running
//!                            ^  ^  |               |  |
//!                            |  `--+---- stop -----'  |
//!                            |     |                  |
//!                            |   dismiss, quiesce, or lost by any error
//!                            |     v                  v
//!                            |   Absent { kept } <----'
//!                            |     |
//!                            `- reconnect ----> Running
//! ```
//!
//! What outlives a connection is [`Kept`]: all that a new process in the backend's place has to be
//! told. A connection that ends gives it back, and nothing in it is ever made anew; the kernel's
//! doorbells and interrupts keep pointing at the same eventfds. [`Absent`] has no deadline: the
//! guest's requests and kicks wait for as long as it takes.
//!
//! Every conversation has a time limit, see [`watchdog`](super::watchdog). Messages are sent one
//! after the other without waiting; one reply at the end shows that all of them were taken.
//!
//! A backend is not trusted: what it says is checked here, once.

mod base;
mod channel;
mod configuration;
mod connected;
mod follow;
mod inflight;
mod kept;
mod link;
mod memory;
mod reconnect;
mod rings;
mod session;
mod status;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::device_kind::DeviceKind;
use super::watchdog::Watchdog;

pub use base::{Base, BaseUnknown};
pub use channel::{ChannelError, Heard};
pub use configuration::{ConfigDiffers, Configuration};
pub use connected::Connected;
pub use inflight::InflightRegion;
pub use kept::{Kept, Vring};
pub use link::{FrontendError, LinkState};
pub use memory::QueueOutside;
pub use reconnect::{Absence, Absent, ReconnectError, Reconnected, Refused};
pub use session::{DriverFault, Idle, Lost, Negotiated, Running, Serving, Session, StartError};

/// What the supervisor says about a device, as the backend can't.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The device's name in logs and requests.
    pub id: String,
    /// The device type, which vhost-user does not tell.
    pub kind: DeviceKind,
    /// How many queues the guest sees; otherwise what the backend says, or else what is usual.
    pub queues: Option<u16>,
    /// The largest size of each queue; a power of two.
    pub queue_size: u16,
    /// The configuration, for backends that have none to ask for.
    pub config_bytes: Option<Vec<u8>>,
    /// How much of the configuration the backend is asked for; otherwise what is usual.
    pub config_len_bytes: Option<u16>,
    /// How long a conversation with the backend may take.
    pub limits: Limits,
}

/// How long a backend may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From connecting until it is negotiated; the process may still be starting.
    pub negotiate: Duration,
    /// For all that is to be done at once: to start, to stop (which ends its requests in flight),
    /// to take configuration writes.
    pub converse: Duration,
    /// To be told all that its predecessor knew. The supervisor has seen the process ready.
    pub reconnect: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let (negotiate, rest) = (Duration::from_secs(20), Duration::from_secs(10));
        Self { negotiate, converse: rest, reconnect: rest }
    }
}

impl DeviceConfig {
    /// A device of this type, with everything else as the backend says or as usual.
    #[must_use]
    pub fn new(id: &str, kind: DeviceKind) -> Self {
        Self {
            id: id.to_owned(),
            kind,
            queues: None,
            queue_size: 256,
            config_bytes: None,
            config_len_bytes: None,
            limits: Limits::default(),
        }
    }
}

/// Negotiates with the backend at the other end of `socket`.
///
/// It blocks until the backend answered or `config.limits.negotiate` is over; several devices
/// connect side by side, each on a thread of its own.
///
/// # Errors
///
/// Fails if the backend hangs, hangs up, answers nonsense, or can't serve this device.
pub fn connect(
    config: DeviceConfig,
    socket: UnixStream,
    watchdog: &Watchdog,
) -> Result<Negotiated, FrontendError> {
    Connected::new(config, socket, watchdog)?.negotiate()
}
