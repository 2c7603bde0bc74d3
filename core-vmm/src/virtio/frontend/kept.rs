//! What outlives a connection.

use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DeviceConfig, FrontendError};
use crate::virtio::features;
use crate::virtio::pci_registers::QueueLayout;

/// All that a backend was told or said, enough to tell it to another one in its place.
pub struct Kept {
    /// What the supervisor said.
    pub config: DeviceConfig,
    /// Features that the backend offered, with those that never reach a guest.
    pub backend_features: u64,
    /// Protocol features that were agreed upon.
    pub protocol_features: VhostUserProtocolFeatures,
    /// The device's configuration as the backend last gave it, or else the supervisor.
    pub config_cache: Vec<u8>,
    /// What the driver acknowledged; 0 before it is ready.
    pub acknowledged: u64,
    /// One for each queue.
    pub vrings: Vec<Vring>,
    /// The memory that the backend has mapped.
    pub memory: Vec<VhostUserMemoryRegionInfo>,
    /// The backend's end of it signals errors of any ring.
    pub error_event: EventFd,
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
    /// Where the backend stopped: the next entry of the available ring it would have taken.
    pub last_base: u16,
}

impl Kept {
    pub(super) fn new(
        config: DeviceConfig,
        backend_features: u64,
        protocol_features: VhostUserProtocolFeatures,
        queues: u16,
    ) -> Result<Self, FrontendError> {
        let vrings = (0..queues).map(|_| Vring::new()).collect::<Result<_, _>>()?;
        Ok(Self {
            config_cache: config.config_bytes.clone().unwrap_or_default(),
            config,
            backend_features,
            protocol_features,
            acknowledged: 0,
            vrings,
            memory: Vec::new(),
            error_event: event()?,
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

    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features.contains(feature)
    }

    /// Whether rings are enabled one by one: otherwise a kick descriptor is enough.
    pub(super) fn enables_rings(&self) -> bool {
        self.backend_features & features::PROTOCOL_FEATURES != 0
    }
}

impl Vring {
    fn new() -> Result<Self, FrontendError> {
        Ok(Self { kick: event()?, call: event()?, layout: None, last_base: 0 })
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
