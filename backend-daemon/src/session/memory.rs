//! The memory that a frontend shares: the guest's, the region of chains in flight, and the log of
//! written pages.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog, VhostUserMemoryRegion};
use vm_memory::GuestAddressSpace;

use super::{LOG_ALL, Session, SessionError};
use crate::device::{Device, QueueIndex};
use crate::dirty::{Bits, DirtyLog};
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

    /// Logs written pages there from now on, as long as `LOG_ALL` is acknowledged.
    pub(crate) fn set_dirty_log(
        &mut self,
        given: &VhostUserLog,
        file: File,
    ) -> Result<(), SessionError> {
        self.dirty = Some(Arc::new(Bits::map(given, file)?));
        self.renew_dirty_logs()
    }

    pub(super) fn dirty_log(&self, queue: QueueIndex) -> Option<DirtyLog> {
        self.acked.filter(|acked| acked & LOG_ALL != 0)?;
        let used_ring = self.vrings[usize::from(queue.0)].logged_at;
        self.dirty.clone().map(|bits| DirtyLog { bits, used_ring })
    }

    /// Tells a running ring's worker what is to be logged now.
    pub(super) fn renew_dirty_log(&self, queue: QueueIndex) -> Result<(), SessionError> {
        self.worker(queue).order(Order::Dirty(queue, self.dirty_log(queue)))?;
        Ok(())
    }

    pub(super) fn renew_dirty_logs(&self) -> Result<(), SessionError> {
        let running =
            (0..).map(QueueIndex).zip(&self.vrings).filter(|(_queue, vring)| vring.running);
        running.map(|(queue, _vring)| queue).try_for_each(|queue| self.renew_dirty_log(queue))
    }
}
