//! What outlives a connection.

use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::base::Base;
use super::configuration::Configuration;
use super::connected::Offer;
use super::inflight::InflightRegion;
use super::{DeviceConfig, FrontendError};
use crate::virtio::features;
use crate::virtio::pci_registers::{Activation, QueueLayout};
use crate::virtio::watchdog::Watchdog;

/// All that a backend was told or said, enough to tell it to another one in its place.
pub struct Kept {
    /// What the supervisor said.
    pub config: DeviceConfig,
    /// Features that every backend so far offered, with those that never reach a guest.
    pub backend_features: u64,
    /// Protocol features that were agreed upon.
    pub protocol_features: VhostUserProtocolFeatures,
    /// The device's configuration as the backend last gave it, or else the supervisor.
    pub configuration: Configuration,
    /// What the driver acknowledged; 0 before it is ready.
    pub acknowledged: u64,
    /// One for each queue.
    pub vrings: Vec<Vring>,
    /// The memory that the backend was told of; nothing before its first driver.
    pub memory: Vec<VhostUserMemoryRegionInfo>,
    /// How many regions of memory the backend takes.
    pub max_regions: usize,
    /// Where the backend marks what is in flight: this driver's, if the backend can.
    pub inflight: Option<InflightRegion>,
    /// The backend's end of it signals errors of any ring.
    pub error_event: EventFd,
    /// Bounds the conversations.
    pub(super) watchdog: Watchdog,
}

/// One queue, as its backend knows it.
pub struct Vring {
    /// Guest to device. Made once: KVM's doorbell points at it, and kicks that come while there is
    /// no backend accumulate in it.
    pub kick: EventFd,
    /// Device to guest. Made once: the function's vectors are bound to it.
    pub call: EventFd,
    /// Where the driver put it, if it is enabled.
    pub layout: Option<QueueLayout>,
    /// Where the next backend goes on.
    pub base: Base,
}

impl Kept {
    pub(super) fn new(
        config: DeviceConfig,
        offer: &Offer,
        queues: u16,
        watchdog: Watchdog,
    ) -> Result<Self, FrontendError> {
        let vrings = (0..queues).map(|_| Vring::new()).collect::<Result<_, _>>()?;
        Ok(Self {
            configuration: Configuration::new(config.config_bytes.clone().unwrap_or_default()),
            config,
            backend_features: offer.features,
            protocol_features: offer.protocol,
            acknowledged: 0,
            vrings,
            memory: Vec::new(),
            max_regions: offer.regions,
            inflight: None,
            error_event: event()?,
            watchdog,
        })
    }

    /// The features that a guest is offered.
    #[must_use]
    pub fn offered(&self) -> u64 {
        features::offered_to_guest(self.backend_features)
    }

    /// Whether writes to the configuration reach the backend.
    #[must_use]
    pub fn config_is_writable(&self) -> bool {
        self.protocol_features.contains(VhostUserProtocolFeatures::CONFIG)
    }

    /// Whether a driver's rings were handed to a backend, and not reset since.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.acknowledged != 0
    }

    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features.contains(feature)
    }

    /// Whether rings are enabled one by one: otherwise a kick descriptor is enough.
    pub(super) fn enables_rings(&self) -> bool {
        self.backend_features & features::PROTOCOL_FEATURES != 0
    }

    /// A driver is ready, with rings that nobody has served yet.
    pub(super) fn take_driver(&mut self, activation: &Activation) {
        self.acknowledged = activation.features;
        for (vring, layout) in self.vrings.iter_mut().zip(&activation.queues) {
            vring.layout = *layout;
            vring.base = Base::Exact(0);
        }
    }

    /// The driver has reset the device: nothing of it is ever told to a backend again.
    pub(super) fn forget_driver(&mut self) {
        self.acknowledged = 0;
        self.inflight = None;
        self.configuration.forget_driver();
        for vring in &mut self.vrings {
            vring.layout = None;
            vring.base = Base::Exact(0);
        }
    }
}

impl Vring {
    fn new() -> Result<Self, FrontendError> {
        Ok(Self { kick: event()?, call: event()?, layout: None, base: Base::Exact(0) })
    }
}

/// Non-blocking, as nobody may wait for the other end.
fn event() -> Result<EventFd, FrontendError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| FrontendError::Host { what: "make an eventfd", source })
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept")
            .field("config", &self.config)
            .field("backend_features", &self.backend_features)
            .field("queues", &self.vrings.len())
            .finish_non_exhaustive()
    }
}
