//! The memory that a frontend shares: the guest's, and the region of chains in flight.

use std::fs::File;

use vhost::vhost_user::message::{VhostUserInflight, VhostUserMemoryRegion};
use vm_memory::GuestAddressSpace;

use super::{Session, SessionError};
use crate::device::Device;
use crate::inflight::{Region, make};
use crate::memory::Table;
use crate::worker::Order;

impl<D: Device> Session<D> {
    /// Makes a region to mark chains in flight in. It is the frontend's to keep and to give back.
    pub(crate) fn make_inflight(
        &self,
        asked: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File), SessionError> {
        Ok(make(asked, self.queue_count(), self.max_queue_size)?)
    }

    /// Marks chains in flight in this region from now on, and goes on from what is marked there.
    pub(crate) fn set_inflight(
        &mut self,
        given: &VhostUserInflight,
        file: File,
    ) -> Result<(), SessionError> {
        if let Some(queue) = (0..).zip(&self.vrings).find(|(_queue, vring)| vring.running) {
            return Err(SessionError::SetUpWhileRunning { queue: queue.0 });
        }
        self.inflight = Some(Region::adopt(given, file, self.queue_count())?);
        Ok(())
    }

    /// Replaces the whole memory table.
    pub(crate) fn set_memory(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<(), SessionError> {
        self.exchange(Table::of(regions, files)?)
    }

    pub(crate) fn add_memory(
        &mut self,
        region: &VhostUserMemoryRegion,
        file: File,
    ) -> Result<(), SessionError> {
        let mut table = self.table.clone();
        table.add(region, file)?;
        self.exchange(table)
    }

    pub(crate) fn remove_memory(
        &mut self,
        region: &VhostUserMemoryRegion,
    ) -> Result<(), SessionError> {
        let mut table = self.table.clone();
        table.remove(region)?;
        self.exchange(table)
    }

    pub(super) fn exchange(&mut self, table: Table) -> Result<(), SessionError> {
        let memory = table.memory()?;
        match self.memory.lock() {
            Ok(exclusive) => exclusive.replace(memory),
            // The lock is held nowhere else, and replacing can't panic.
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
        self.table = table;
        for worker in &self.workers {
            worker.order(Order::Memory(self.memory.memory()))?;
        }
        Ok(())
    }
}
