//! What a backend is told to set up, start and stop its rings, message by message.
//!
//! The order suits a first backend and one that replaces another: nothing is served before the
//! last ring has a kick descriptor and, where rings are enabled one by one, is enabled.

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};

use super::base::Base;
use super::kept::{Kept, Vring};
use super::memory::{BASELINE_REGIONS, HostLayout};
use crate::virtio::features;

/// What the driver chose of the features.
pub(super) fn set_features(frontend: &mut Frontend, kept: &Kept) -> vhost::Result<()> {
    frontend.set_features(features::for_backend(kept.acknowledged, kept.backend_features))
}

/// Everything else that a backend needs to know before it may start. `bases` are the enabled queues'.
pub(super) fn set_up(
    frontend: &mut Frontend,
    kept: &Kept,
    layouts: &[Option<HostLayout>],
    bases: &[Option<u16>],
) -> vhost::Result<()> {
    set_memory(frontend, kept)?;
    let rings = kept.vrings.iter().zip(layouts).zip(bases).enumerate();
    let rings: Vec<_> = rings
        .filter_map(|(index, ((vring, host), base))| {
            Some((index, vring, vring.layout?.size, host.as_ref()?, (*base)?))
        })
        .collect();
    for (index, _vring, size, _host, _base) in &rings {
        frontend.set_vring_num(*index, *size)?;
    }
    if let Some(region) = &kept.inflight {
        region.give(frontend)?;
    }
    for (index, vring, size, host, base) in rings {
        frontend.set_vring_addr(index, &addresses(size, host))?;
        frontend.set_vring_base(index, base)?;
        frontend.set_vring_call(index, &vring.call)?;
        frontend.set_vring_err(index, &kept.error_event)?;
    }
    barrier(frontend)
}

/// Lets the rings run that were set up.
pub(super) fn start(frontend: &mut Frontend, kept: &Kept) -> vhost::Result<()> {
    for (index, vring) in enabled(kept) {
        frontend.set_vring_kick(index, &vring.kick)?;
    }
    if kept.enables_rings() {
        for (index, _vring) in enabled(kept) {
            frontend.set_vring_enable(index, true)?;
        }
    }
    barrier(frontend)
}

/// Ends what is in flight and forgets the driver.
pub(super) fn stop(frontend: &mut Frontend, kept: &Kept) -> vhost::Result<()> {
    if kept.enables_rings() {
        for (index, _vring) in enabled(kept) {
            frontend.set_vring_enable(index, false)?;
        }
    }
    for (index, _vring) in enabled(kept) {
        frontend.get_vring_base(index)?;
    }
    if kept.has(VhostUserProtocolFeatures::RESET_DEVICE) {
        acknowledged(frontend, kept, VhostUserFrontend::reset_device)?;
    }
    Ok(())
}

/// Ends what is in flight and keeps where each ring stopped.
///
/// A ring is not disabled before: a nic's that is disabled throws the guest's packets away
/// (vhost-user, "Ring states"), and `GET_VRING_BASE` alone stops it.
pub(super) fn drain(frontend: &mut Frontend, kept: &mut Kept) -> vhost::Result<()> {
    for (index, vring) in kept.vrings.iter_mut().enumerate() {
        if vring.layout.is_some() {
            let base = frontend.get_vring_base(index)?;
            // A split ring's position is 16 bits.
            vring.base = u16::try_from(base & 0xffff).map_or(Base::Unknown, Base::Exact);
        }
    }
    Ok(())
}

fn enabled(kept: &Kept) -> impl Iterator<Item = (usize, &Vring)> {
    kept.vrings.iter().enumerate().filter(|(_index, vring)| vring.layout.is_some())
}

/// Returns when the backend has taken every message before it. Any request with a reply does.
pub(super) fn barrier(frontend: &Frontend) -> vhost::Result<()> {
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

/// Tells the whole of the guest's memory.
pub(super) fn set_memory(frontend: &mut Frontend, kept: &Kept) -> vhost::Result<()> {
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
pub(super) fn acknowledged(
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
