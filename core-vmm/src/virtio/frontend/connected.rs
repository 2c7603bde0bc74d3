//! The first conversation: who are you, and what can you do?

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::DeviceConfig;
use super::kept::Kept;
use super::link::{FrontendError, Link};
use super::rings::Negotiated;
use crate::virtio::bar_layout::{MAX_CONFIG_LEN_BYTES, MAX_QUEUES};
use crate::virtio::features::{PROTOCOL_FEATURES, VERSION_1};
use crate::virtio::watchdog::Watchdog;

/// Largest queue (virtio 1.3, section 2.7).
const MAX_QUEUE_SIZE: u16 = 1 << 15;

/// A connection on which nothing was said yet.
pub struct Connected {
    link: Link,
    config: DeviceConfig,
}

/// What the backend answered about itself.
struct Offer {
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// How many queues it says it has, if it can say.
    queues: Option<u64>,
}

/// The protocol features that we have a use for.
fn wanted() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
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
        Ok(Self { link, config })
    }

    /// Asks the backend for everything that stays constant.
    ///
    /// # Errors
    ///
    /// Fails if the backend hangs, hangs up, answers nonsense, or can't serve this device.
    pub fn negotiate(mut self) -> Result<Negotiated, FrontendError> {
        let limit = self.config.limits.negotiate;
        let deadline = Instant::now() + limit;
        let supervisor_knows_queues = self.config.queues.is_some();
        let offer = self.link.converse("say what it offers", limit, |frontend| {
            Offer::ask(frontend, !supervisor_knows_queues)
        })?;
        if offer.features & VERSION_1 == 0 {
            return Err(FrontendError::NoVersion1 { features: offer.features });
        }
        let queues = self.queue_count(offer.queues)?;
        let mut kept = Kept::new(self.config, offer.features, offer.protocol, queues)?;
        let rest = deadline.saturating_duration_since(Instant::now());
        if let Some(config) = read_config(&mut self.link, &kept, rest)? {
            kept.config_cache = config;
        }
        Ok(Negotiated::new(self.link, kept))
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
    fn ask(frontend: &mut Frontend, ask_queues: bool) -> vhost::Result<Self> {
        frontend.set_owner()?;
        let features = frontend.get_features()?;
        let mut offer =
            Self { features, protocol: VhostUserProtocolFeatures::empty(), queues: None };
        if features & PROTOCOL_FEATURES == 0 {
            return Ok(offer);
        }
        offer.protocol = frontend.get_protocol_features()? & wanted();
        frontend.set_protocol_features(offer.protocol)?;
        if ask_queues && offer.protocol.contains(VhostUserProtocolFeatures::MQ) {
            offer.queues = Some(frontend.get_queue_num()?);
        }
        Ok(offer)
    }
}

/// The configuration as the backend has it, if it has one that can be asked for.
pub(super) fn read_config(
    link: &mut Link,
    kept: &Kept,
    limit: Duration,
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
    let (_header, config) = link.converse("give its configuration", limit, |frontend| {
        let buffer = vec![0; len.into()];
        frontend.get_config(0, len.into(), VhostUserConfigFlags::empty(), &buffer)
    })?;
    Ok(Some(config))
}
