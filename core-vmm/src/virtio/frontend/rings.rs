//! Starting and stopping the rings of a backend that is negotiated.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::GuestMemoryMmap;

use super::connected::read_config;
use super::kept::{Kept, Vring};
use super::link::{FrontendError, Link, LinkState};
use super::memory::{self, BASELINE_REGIONS, HostLayout, QueueOutside};
use crate::virtio::features;
use crate::virtio::pci_registers::{Activation, ConfigWrite};

/// A connection that is over, and what outlives it.
pub struct Lost {
    /// For the next connection.
    pub kept: Box<Kept>,
    /// Why it is over.
    pub error: FrontendError,
    /// Closed when this is dropped; until then it can be taken out of where it is watched.
    link: Link,
}

/// Why a backend did not start.
#[derive(Debug)]
pub enum StartError {
    /// The driver's queues are impossible; the connection is as it was.
    Driver(Box<Negotiated>, QueueOutside),
    /// The connection is over.
    Lost(Lost),
}

/// A backend that is known and has nothing to do. The guest may not have found the device yet, or
/// has reset it.
pub struct Negotiated {
    link: Link,
    kept: Box<Kept>,
}

/// A backend that serves its rings.
pub struct Running {
    link: Link,
    kept: Box<Kept>,
}

impl Negotiated {
    pub(super) fn new(link: Link, kept: Kept) -> Self {
        Self { link, kept: Box::new(kept) }
    }

    /// What outlives the connection.
    #[must_use]
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Whether the backend is still there.
    #[must_use]
    pub fn link_state(&self) -> LinkState {
        self.link.state()
    }

    /// Gives the connection up.
    #[must_use]
    pub fn give_up(self, error: FrontendError) -> Lost {
        Lost { kept: self.kept, error, link: self.link }
    }

    /// The driver is ready: hands memory and rings to the backend.
    ///
    /// # Errors
    ///
    /// Fails if the driver's queues are impossible, or the connection is lost.
    pub fn start(
        mut self,
        activation: &Activation,
        memory: &GuestMemoryMmap,
    ) -> Result<Running, StartError> {
        let regions = match memory::regions(memory) {
            Ok(regions) => regions,
            Err(error) => return Err(StartError::Lost(self.give_up(error))),
        };
        let mut layouts = Vec::new();
        for (queue, layout) in activation.queues.iter().enumerate() {
            let host = layout
                .as_ref()
                .map(|layout| memory::host_layout(&regions, layout).ok_or(QueueOutside { queue }));
            match host.transpose() {
                Ok(host) => layouts.push(host),
                Err(outside) => return Err(StartError::Driver(Box::new(self), outside)),
            }
        }
        let kept = &mut *self.kept;
        kept.acknowledged = activation.features;
        kept.memory = regions;
        for (vring, layout) in kept.vrings.iter_mut().zip(&activation.queues) {
            vring.layout = *layout;
            vring.last_base = 0;
        }
        let limit = kept.config.limits.converse;
        let started =
            self.link.converse("start", limit, |frontend| start(frontend, kept, &layouts));
        match started {
            Ok(()) => Ok(Running { link: self.link, kept: self.kept }),
            Err(error) => Err(StartError::Lost(self.give_up(error))),
        }
    }

    /// Hands a write of the driver to the configuration on, and reads back what became of it.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost.
    pub fn write_config(&mut self, write: &ConfigWrite) -> Result<(), FrontendError> {
        write_config(&mut self.link, &mut self.kept, write)
    }
}

impl Running {
    /// What outlives the connection.
    #[must_use]
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Whether the backend is still there.
    #[must_use]
    pub fn link_state(&self) -> LinkState {
        self.link.state()
    }

    /// Gives the connection up.
    #[must_use]
    pub fn give_up(self, error: FrontendError) -> Lost {
        Lost { kept: self.kept, error, link: self.link }
    }

    /// The driver resets the device: ends what is in flight and stops the rings. The connection
    /// stays.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost.
    pub fn stop(mut self) -> Result<Negotiated, Lost> {
        let kept = &mut *self.kept;
        let limit = kept.config.limits.converse;
        let stopped = self.link.converse("stop", limit, |frontend| stop(frontend, kept));
        match stopped {
            Ok(()) => {
                kept.acknowledged = 0;
                Ok(Negotiated { link: self.link, kept: self.kept })
            }
            Err(error) => Err(self.give_up(error)),
        }
    }

    /// As [`Negotiated::write_config`].
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost.
    pub fn write_config(&mut self, write: &ConfigWrite) -> Result<(), FrontendError> {
        write_config(&mut self.link, &mut self.kept, write)
    }
}

fn write_config(
    link: &mut Link,
    kept: &mut Kept,
    write: &ConfigWrite,
) -> Result<(), FrontendError> {
    if !kept.config_is_writable() {
        return Ok(());
    }
    let limit = kept.config.limits.converse;
    link.converse("take a write to its configuration", limit, |frontend| {
        frontend.set_config(write.offset, VhostUserConfigFlags::empty(), &write.bytes)
    })?;
    if let Some(config) = read_config(link, kept, limit)? {
        kept.config_cache = config;
    }
    Ok(())
}

/// All that a backend needs to serve the rings, in the order that also suits a replacement.
fn start(
    frontend: &mut Frontend,
    kept: &Kept,
    layouts: &[Option<HostLayout>],
) -> vhost::Result<()> {
    frontend.set_features(features::for_backend(kept.acknowledged, kept.backend_features))?;
    set_memory(frontend, kept)?;
    let used: Vec<(usize, &Vring, &HostLayout)> = kept
        .vrings
        .iter()
        .zip(layouts)
        .enumerate()
        .filter_map(|(index, (vring, layout))| Some((index, vring, layout.as_ref()?)))
        .collect();
    for (index, vring, _host) in &used {
        frontend.set_vring_num(*index, vring.layout.map_or(0, |layout| layout.size))?;
    }
    for (index, vring, host) in &used {
        let size = vring.layout.map_or(0, |layout| layout.size);
        frontend.set_vring_addr(*index, &addresses(size, host))?;
        frontend.set_vring_base(*index, vring.last_base)?;
        frontend.set_vring_call(*index, &vring.call)?;
        frontend.set_vring_err(*index, &kept.error_event)?;
        frontend.set_vring_kick(*index, &vring.kick)?;
    }
    if kept.enables_rings() {
        for (index, _vring, _host) in &used {
            frontend.set_vring_enable(*index, true)?;
        }
    }
    barrier(frontend)
}

/// Returns when the backend has taken every message before it. Any request with a reply does.
fn barrier(frontend: &Frontend) -> vhost::Result<()> {
    frontend.get_features()?;
    Ok(())
}

fn addresses(size: u16, host: &HostLayout) -> VringConfigData {
    VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr: host.descriptors,
        used_ring_addr: host.used,
        avail_ring_addr: host.available,
        log_addr: None,
    }
}

fn set_memory(frontend: &mut Frontend, kept: &Kept) -> vhost::Result<()> {
    let (baseline, more) =
        kept.memory.split_at_checked(BASELINE_REGIONS).unwrap_or((&kept.memory, &[]));
    // The one message whose refusal is worth a word of its own: the backend may not be able to map
    // the memory.
    acknowledged(frontend, kept, |frontend| frontend.set_mem_table(baseline))?;
    for region in more {
        acknowledged(frontend, kept, |frontend| frontend.add_mem_region(region))?;
    }
    Ok(())
}

/// Sends a message and waits for its acknowledgement, where the backend gives any.
fn acknowledged(
    frontend: &mut Frontend,
    kept: &Kept,
    send: impl FnOnce(&mut Frontend) -> vhost::Result<()>,
) -> vhost::Result<()> {
    if kept.has(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let result = send(frontend);
    frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
    result
}

fn stop(frontend: &mut Frontend, kept: &mut Kept) -> vhost::Result<()> {
    let running: Vec<usize> = kept
        .vrings
        .iter()
        .enumerate()
        .filter_map(|(index, vring)| vring.layout.map(|_layout| index))
        .collect();
    if kept.enables_rings() {
        for index in &running {
            frontend.set_vring_enable(*index, false)?;
        }
    }
    for index in running {
        let vring = &mut kept.vrings[index];
        let base = frontend.get_vring_base(index)?;
        // A split ring's position is 16 bits.
        vring.last_base = u16::try_from(base & 0xffff).unwrap_or(0);
        vring.layout = None;
    }
    if kept.has(VhostUserProtocolFeatures::RESET_DEVICE) {
        acknowledged(frontend, kept, VhostUserFrontend::reset_device)?;
    }
    Ok(())
}

impl AsFd for Lost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

impl AsFd for Negotiated {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

impl AsFd for Running {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

impl fmt::Debug for Negotiated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Negotiated").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lost").field("error", &self.error).finish_non_exhaustive()
    }
}
