//! How a backend follows what the guest's memory becomes while it is connected.
//!
//! One that has not been told of any memory has nothing to follow: it gets the whole table when a
//! driver is ready. Where it takes regions one by one it gets only what came and went, otherwise
//! the table again; its rings go on either way. When it has answered, it has mapped what came and
//! begins nothing any more on what went; what is in flight there ends on the old mapping, which is
//! of a file of its own.

use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vm_memory::GuestMemoryMmap;

use super::link::FrontendError;
use super::session::Session;
use super::{memory, rings};
use crate::virtio::watchdog::Deadline;

impl<S> Session<S> {
    /// Has the backend's memory be `memory`.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost.
    pub fn follow(
        &mut self,
        memory: &GuestMemoryMmap,
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        let (link, kept) = self.parts();
        if kept.memory.is_empty() {
            return Ok(());
        }
        let wanted = memory::regions(memory)?;
        let gone = missing(&kept.memory, &wanted);
        let new = missing(&wanted, &kept.memory);
        if gone.is_empty() && new.is_empty() {
            return Ok(());
        }
        kept.memory = wanted;
        let one_by_one = kept.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        link.converse("follow the guest's memory", deadline, |frontend| {
            if !one_by_one {
                rings::set_memory(frontend, kept)?;
                return rings::barrier(frontend);
            }
            for region in &gone {
                rings::acknowledged(frontend, kept, |frontend: &mut Frontend| {
                    frontend.remove_mem_region(region)
                })?;
            }
            for region in &new {
                rings::acknowledged(frontend, kept, |frontend: &mut Frontend| {
                    frontend.add_mem_region(region)
                })?;
            }
            rings::barrier(frontend)
        })
    }
}

/// Those of `some` that are not among `others`.
fn missing(
    some: &[VhostUserMemoryRegionInfo],
    others: &[VhostUserMemoryRegionInfo],
) -> Vec<VhostUserMemoryRegionInfo> {
    let key = |region: &VhostUserMemoryRegionInfo| {
        (region.guest_phys_addr, region.memory_size, region.userspace_addr)
    };
    let is_missing =
        |region: &&VhostUserMemoryRegionInfo| !others.iter().any(|other| key(other) == key(region));
    some.iter().filter(is_missing).copied().collect()
}
