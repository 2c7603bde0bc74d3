//! A device without a backend, and how another process takes the backend's place.
//!
//! ```text
//! Absent --reconnect--> say what you offer -> compare -> set up -> start -> Session
//!    ^                        |                  |         |         |
//!    `---- Refused <----------+------------------+---------+---------'
//! ```
//!
//! A backend that is refused leaves the device as it was; the next one begins from the start. What
//! may have been served before a refusal is found in the guest's memory, never guessed.

use std::os::unix::net::UnixStream;

use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::base::{self, BaseUnknown};
use super::configuration::ConfigDiffers;
use super::connected::{Offer, open_channel, read_config};
use super::kept::Kept;
use super::link::{FrontendError, Link};
use super::memory::QueueOutside;
use super::session::{self, Negotiated, Running, Session};
use crate::virtio::bar_layout::MAX_QUEUES;
use crate::virtio::pci_registers::{Activation, ConfigWrite};
use crate::virtio::{features, watchdog::Deadline};

/// A device that waits for a backend.
#[derive(Debug)]
pub struct Absent {
    kept: Box<Kept>,
    absence: Absence,
}

/// Why there is no backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// It hung up, hung or broke the protocol.
    Lost {
        /// It had a driver's rings, and may write to the guest's memory until its process and all
        /// that it had asked the kernel for have ended.
        may_write: bool,
    },
    /// It was asked away.
    Quiesced,
}

/// A backend in its predecessor's place.
#[derive(Debug)]
pub enum Reconnected {
    /// There is no driver, or none that it could serve.
    Negotiated(Negotiated),
    /// It serves the driver's rings from where they were.
    Running(Running),
}

/// A backend was refused; the device is as it was.
#[derive(Debug)]
pub struct Refused {
    /// For the next one.
    pub absent: Absent,
    /// Why.
    pub error: ReconnectError,
}

/// Why a backend can't take another's place.
#[derive(Debug, thiserror::Error)]
pub enum ReconnectError {
    /// What the driver agreed upon is missing.
    #[error("the new backend does not offer features {missing:#x}, which the driver uses")]
    Features {
        /// Those.
        missing: u64,
    },
    /// What was agreed upon with the first backend is missing.
    #[error("the new backend does not offer protocol features {missing:#x}, which are agreed upon")]
    ProtocolFeatures {
        /// Those.
        missing: u64,
    },
    /// The guest knows more queues.
    #[error("the device has {wanted} queues, the new backend {offered}")]
    Queues {
        /// As the guest knows.
        wanted: usize,
        /// As the backend says.
        offered: u64,
    },
    /// The guest has more memory.
    #[error("the guest's memory has {wanted} regions, the new backend takes {offered}")]
    Regions {
        /// As there are.
        wanted: usize,
        /// As the backend says.
        offered: usize,
    },
    /// It is another device.
    #[error("the new backend is of another device")]
    Config(#[from] ConfigDiffers),
    /// Nobody knows where to go on.
    #[error("there is no telling where to go on")]
    Base(#[from] BaseUnknown),
    /// The memory has changed under the driver's rings: a bug of ours.
    #[error("the driver's rings are gone")]
    Queue(#[from] QueueOutside),
    /// The conversation failed.
    #[error("the new backend failed")]
    Backend(#[from] FrontendError),
}

impl Absent {
    pub(super) fn new(kept: Box<Kept>, absence: Absence) -> Self {
        Self { kept, absence }
    }

    /// What outlives the connections.
    #[must_use]
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Why there is no backend.
    #[must_use]
    pub fn absence(&self) -> Absence {
        self.absence
    }

    /// Whether the guest's memory may still be written by the process that was the backend.
    #[must_use]
    pub fn may_write(&self) -> bool {
        self.absence == Absence::Lost { may_write: true }
    }

    /// The process that was the backend has ended.
    pub fn predecessor_ended(&mut self) {
        if let Absence::Lost { may_write } = &mut self.absence {
            *may_write = false;
        }
    }

    /// Keeps what the driver writes to the configuration for the next backend.
    pub fn write_config(&mut self, writes: &[ConfigWrite]) {
        for write in writes {
            self.kept.configuration.write(write);
        }
    }

    /// The driver has reset the device.
    pub fn forget_driver(&mut self) {
        self.kept.forget_driver();
    }

    /// Makes the backend at the other end of `socket` take its predecessor's place. The driver's
    /// rings are handed to it if `serve` and if a predecessor had them.
    ///
    /// # Errors
    ///
    /// Fails if the backend does not fit or does not do as it should by `deadline`.
    pub fn reconnect(
        mut self,
        socket: UnixStream,
        memory: &GuestMemoryMmap,
        serve: bool,
        deadline: Deadline,
    ) -> Result<Reconnected, Refused> {
        let kept = &mut *self.kept;
        // This one knows of none yet.
        kept.memory.clear();
        let queues = kept.config.queues.unwrap_or(MAX_QUEUES);
        let mut link = match Link::new(socket, queues, &kept.watchdog) {
            Ok(link) => link,
            Err(error) => return Err(Refused { absent: self, error: error.into() }),
        };
        let regions = memory.num_regions();
        if let Err(error) = compare(&mut link, kept, regions, deadline) {
            return Err(Refused { absent: self, error });
        }
        if !(serve && kept.has_driver()) {
            return Ok(Reconnected::Negotiated(Session::new(link, self.kept)));
        }
        match replay(&mut link, kept, memory, deadline) {
            Ok(()) => Ok(Reconnected::Running(Session::new(link, self.kept))),
            Err(ReconnectError::Backend(error)) => {
                let lost = Negotiated::new(link, self.kept).give_up(error);
                Err(lost.into_refused())
            }
            Err(error) => Err(Refused { absent: self, error }),
        }
    }
}

/// Whether the new backend is as the guest knows the device.
fn compare(
    link: &mut Link,
    kept: &mut Kept,
    regions: usize,
    deadline: Deadline,
) -> Result<(), ReconnectError> {
    let agreed = kept.protocol_features;
    let ask_queues = kept.config.queues.is_none();
    let offer = link.converse("say what it offers", deadline, |frontend| {
        Offer::ask(frontend, agreed, ask_queues)
    })?;
    let needed =
        features::for_backend(kept.acknowledged, kept.backend_features) | features::VERSION_1;
    let missing = needed & !offer.features;
    if missing != 0 {
        return Err(ReconnectError::Features { missing });
    }
    let missing = (agreed - offer.protocol).bits();
    if missing != 0 {
        return Err(ReconnectError::ProtocolFeatures { missing });
    }
    let wanted = kept.vrings.len();
    if let Some(offered) = offer.queues.filter(|offered| *offered < wanted as u64) {
        return Err(ReconnectError::Queues { wanted, offered });
    }
    if offer.regions < regions {
        return Err(ReconnectError::Regions { wanted: regions, offered: offer.regions });
    }
    kept.max_regions = offer.regions;
    open_channel(link, kept, deadline)?;
    if let Some(theirs) = read_config(link, kept, deadline)? {
        let repeat = kept.configuration.to_repeat(&theirs)?;
        let theirs = if repeat.is_empty() {
            theirs
        } else {
            session::write_config(link, &repeat, deadline)?;
            read_config(link, kept, deadline)?.unwrap_or(theirs)
        };
        kept.configuration.adopt(&theirs)?;
    }
    // A driver that comes later is offered what all of them have.
    kept.backend_features &= offer.features;
    Ok(())
}

/// Tells the new backend all that its predecessor knew.
fn replay(
    link: &mut Link,
    kept: &mut Kept,
    memory: &GuestMemoryMmap,
    deadline: Deadline,
) -> Result<(), ReconnectError> {
    let bases = base::resolve(kept, memory)?;
    let activation = Activation {
        features: kept.acknowledged,
        queues: kept.vrings.iter().map(|vring| vring.layout).collect(),
    };
    let layouts = kept.place(memory, &activation)??;
    if kept.inflight.is_none() {
        // The predecessor was lost before it had made one. Nothing of before is in the new one, and
        // nothing has to be: the bases say it all.
        session::track(link, kept, deadline)?;
    }
    Ok(session::serve(link, kept, &layouts, &bases, deadline)?)
}
