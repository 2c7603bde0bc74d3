//! How the device's backend follows RAM that comes and goes.

use vm_memory::GuestMemoryMmap;

use super::VirtioDevice;
use super::backend::Backend;

impl VirtioDevice {
    /// Has the backend's memory be `memory`. One that can't is lost; one that is not there, or has
    /// no driver yet, is told later.
    pub fn follow_memory(&mut self, memory: &GuestMemoryMmap) {
        let deadline = self.deadline();
        let followed = match &mut self.backend {
            Some(Backend::Negotiated(backend)) => backend.follow(memory, deadline),
            Some(Backend::Running(backend)) => backend.follow(memory, deadline),
            Some(Backend::Absent(_)) | None => Ok(()),
        };
        if let Err(error) = followed {
            self.give_up(error);
        }
    }

    /// How many regions of memory the backend takes, or its predecessor did.
    #[must_use]
    pub fn max_regions(&self) -> usize {
        self.backend.as_ref().map_or(usize::MAX, |backend| backend.kept().max_regions)
    }
}
