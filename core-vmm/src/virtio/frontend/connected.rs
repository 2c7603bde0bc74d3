//! The first conversation: who are you, and what can you do?

use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::DeviceConfig;
use super::configuration::Configuration;
use super::kept::Kept;
use super::link::{FrontendError, Link};
use super::memory::BASELINE_REGIONS;
use super::session::Negotiated;
use crate::virtio::bar_layout::{MAX_CONFIG_LEN_BYTES, MAX_QUEUES};
use crate::virtio::features::{PROTOCOL_FEATURES, VERSION_1};
use crate::virtio::watchdog::{Deadline, Watchdog};

/// Largest queue (virtio 1.3, section 2.7).
const MAX_QUEUE_SIZE: u16 = 1 << 15;

/// A connection on which nothing was said yet.
pub struct Connected {
    link: Link,
    config: DeviceConfig,
    watchdog: Watchdog,
}

/// What the backend answered about itself.
pub(super) struct Offer {
    pub(super) features: u64,
    /// Those that are wanted and offered, and agreed upon now.
    pub(super) protocol: VhostUserProtocolFeatures,
    /// How many queues it says it has, if it can say.
    pub(super) queues: Option<u64>,
    /// How many regions of memory it takes.
    pub(super) regions: usize,
}

/// The protocol features that we have a use for.
fn wanted() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::STATUS
}

impl Connected {
    /// Takes over `socket`, whose other end is the backend's.
    ///
    /// # Errors
    ///
    /// Fails if `config` makes no sense, or a descriptor can't be had.
    pub fn new(
        config: DeviceConfig,
        socket: UnixStream,
        watchdog: &Watchdog,
    ) -> Result<Self, FrontendError> {
        let size = config.queue_size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(FrontendError::QueueSize { size });
        }
        let len_bytes = config.config_bytes.as_ref().map_or(0, Vec::len);
        let len_bytes = len_bytes.max(config.config_len_bytes.unwrap_or(0).into());
        if len_bytes > MAX_CONFIG_LEN_BYTES.into() {
            return Err(FrontendError::ConfigLength { len_bytes });
        }
        let link = Link::new(socket, config.queues.unwrap_or(MAX_QUEUES), watchdog)?;
        Ok(Self { link, config, watchdog: watchdog.clone() })
    }

    /// Asks the backend for everything that stays constant.
    ///
    /// # Errors
    ///
    /// Fails if the backend hangs, hangs up, answers nonsense, or can't serve this device.
    pub fn negotiate(mut self) -> Result<Negotiated, FrontendError> {
        let deadline = Deadline::after(self.config.limits.negotiate);
        let ask_queues = self.config.queues.is_none();
        let offer = self.link.converse("say what it offers", deadline, |frontend| {
            Offer::ask(frontend, wanted(), ask_queues)
        })?;
        if offer.features & VERSION_1 == 0 {
            return Err(FrontendError::NoVersion1 { features: offer.features });
        }
        let queues = self.queue_count(offer.queues)?;
        let mut kept = Kept::new(self.config, &offer, queues, self.watchdog)?;
        open_channel(&mut self.link, &kept, deadline)?;
        if let Some(config) = read_config(&mut self.link, &kept, deadline)? {
            kept.configuration = Configuration::new(config);
        }
        Ok(Negotiated::new(self.link, Box::new(kept)))
    }

    fn queue_count(&self, offered: Option<u64>) -> Result<u16, FrontendError> {
        let usual = || u64::from(self.config.kind.queue_count());
        let wanted = self.config.queues.map(u64::from).or(offered).unwrap_or_else(usual);
        let offered = offered.unwrap_or(wanted);
        u16::try_from(wanted)
            .ok()
            .filter(|count| (1..=MAX_QUEUES).contains(count) && wanted <= offered)
            .ok_or(FrontendError::Queues { wanted, offered })
    }
}

impl Offer {
    /// Asks, and agrees upon what is offered of the protocol features that are `wanted`.
    pub(super) fn ask(
        frontend: &mut Frontend,
        wanted: VhostUserProtocolFeatures,
        ask_queues: bool,
    ) -> vhost::Result<Self> {
        frontend.set_owner()?;
        let features = frontend.get_features()?;
        let protocol = VhostUserProtocolFeatures::empty();
        let mut offer = Self { features, protocol, queues: None, regions: BASELINE_REGIONS };
        if features & PROTOCOL_FEATURES == 0 {
            return Ok(offer);
        }
        offer.protocol = frontend.get_protocol_features()? & wanted;
        frontend.set_protocol_features(offer.protocol)?;
        if ask_queues && offer.protocol.contains(VhostUserProtocolFeatures::MQ) {
            offer.queues = Some(frontend.get_queue_num()?);
        }
        if offer.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let slots = frontend.get_max_mem_slots()?;
            offer.regions = usize::try_from(slots).unwrap_or(usize::MAX);
        }
        Ok(offer)
    }
}

/// Lets the backend say when its configuration is another one. Before it is read, so that no change is
/// missed.
pub(super) fn open_channel(
    link: &mut Link,
    kept: &Kept,
    deadline: Deadline,
) -> Result<(), FrontendError> {
    let needed = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG;
    if kept.has(needed) { link.open_channel(deadline) } else { Ok(()) }
}

/// The configuration as the backend has it, if it has one that can be asked for.
pub(super) fn read_config(
    link: &mut Link,
    kept: &Kept,
    deadline: Deadline,
) -> Result<Option<Vec<u8>>, FrontendError> {
    let usual = || {
        kept.config.config_bytes.as_ref().map_or(kept.config.kind.config_len_bytes(), |bytes| {
            u16::try_from(bytes.len()).unwrap_or(MAX_CONFIG_LEN_BYTES)
        })
    };
    let len = kept.config.config_len_bytes.unwrap_or_else(usual);
    if !kept.has(VhostUserProtocolFeatures::CONFIG) || len == 0 {
        return Ok(None);
    }
    let (_header, config) = link.converse("give its configuration", deadline, |frontend| {
        let buffer = vec![0; len.into()];
        frontend.get_config(0, len.into(), VhostUserConfigFlags::empty(), &buffer)
    })?;
    Ok(Some(config))
}
