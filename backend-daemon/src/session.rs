//! One frontend's session with the device: what was negotiated, and which rings run.
//!
//! A ring runs while the frontend has set it up (a kick descriptor is the last of it) and enabled
//! it. Whatever changes a running ring stops it first, which drains it, and starts it again.

mod device;
mod memory;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;

use self::device::Transfer;
use crate::beside::Channel;
use crate::device::{Device, QueueIndex};
use crate::dirty::{Bits, DirtyError};
use crate::doorbell::Doorbell;
use crate::inflight::{InflightError, Region};
use crate::memory::{MemoryError, Table};
use crate::ring::{Memory, Ring, SharedMemory};
use crate::vring::{Addresses, Kick, StartError, Vring};
use crate::worker::{Answer, Handle, Order, WorkerGone};

/// `VHOST_USER_F_PROTOCOL_FEATURES`: with it a ring starts disabled.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_F_LOG_ALL`: with it written pages are logged. It is never a guest's.
const LOG_ALL: u64 = 1 << 26;

/// Why a message of the frontend is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("the features {0:#x} were not offered")]
    NotOffered(u64),
    #[error("the features change while rings run")]
    FeaturesWhileRunning,
    #[error("queue {queue} is set up while it runs")]
    SetUpWhileRunning { queue: u16 },
    #[error("queue {queue} can't have {size} descriptors")]
    Size { queue: u16, size: u32 },
    #[error("queue {queue} can't start at {base}")]
    Base { queue: u16, base: u32 },
    #[error("queue {queue} starts before the features are known")]
    Unnegotiated { queue: u16 },
    #[error("queue {queue} can't start")]
    Start { queue: u16, source: StartError },
    #[error("the kick descriptor of queue {queue} can't be waited for")]
    Kick { queue: u16, source: io::Error },
    #[error("a descriptor of a queue is unusable")]
    Doorbell(#[source] io::Error),
    #[error("the inflight region")]
    Inflight(#[from] InflightError),
    #[error("the log of written pages")]
    Dirty(#[from] DirtyError),
    #[error("the memory table")]
    Memory(#[from] MemoryError),
    #[error("{len_bytes} bytes at {offset} are not in the configuration space")]
    Config { offset: u32, len_bytes: usize },
    #[error("a message has a descriptor too many or too few")]
    Descriptors,
    #[error("the device has no state to hand over")]
    NoState,
    #[error("the device's state is asked for while queue {queue} runs")]
    TransferWhileRunning { queue: u16 },
    #[error("the file for the device's state")]
    Transfer(#[source] io::Error),
    #[error("the device's state was not handed over")]
    NoTransfer,
    #[error(transparent)]
    Worker(#[from] WorkerGone),
}

/// The device with its workers, and the one frontend it has at a time.
pub(crate) struct Session<D> {
    device: D,
    workers: Vec<Handle>,
    /// For each queue, its worker's place in `workers`.
    worker_of: Vec<usize>,
    offered: u64,
    max_queue_size: u16,
    acked: Option<u64>,
    table: Table,
    memory: SharedMemory,
    vrings: Vec<Vring>,
    /// Where chains in flight are marked, if the frontend gave a region for it.
    inflight: Option<Region>,
    /// Where written pages are logged, if the frontend gave room for it.
    dirty: Option<Arc<Bits>>,
    /// The protocol features that the frontend took.
    agreed: u64,
    /// The driver's view of the device (virtio 1.3, section 2.1), as the frontend last told it.
    status: u64,
    /// Where the frontend hears of a new configuration.
    channel: Option<Channel>,
    transfer: Transfer,
}

impl<D: Device> Session<D> {
    pub(crate) fn new(device: D, workers: Vec<Handle>, groups: &[Vec<QueueIndex>]) -> Self {
        let (count, max_queue_size) = (device.queue_count(), device.max_queue_size());
        let worker_of = (0..count)
            .map(|queue| {
                let group = groups.iter().position(|group| group.contains(&QueueIndex(queue)));
                group.expect("the groups were checked to be a partition of the queues")
            })
            .collect();
        let ring_features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let offered = device.features() | ring_features | PROTOCOL_FEATURES | LOG_ALL;
        let vrings = (0..count).map(|_queue| Vring::new(max_queue_size)).collect();
        Self {
            device,
            workers,
            worker_of,
            offered,
            max_queue_size,
            acked: None,
            table: Table::default(),
            memory: SharedMemory::new(Memory::new()),
            vrings,
            inflight: None,
            dirty: None,
            agreed: 0,
            status: 0,
            channel: None,
            transfer: Transfer::None,
        }
    }

    /// The features on offer.
    pub(crate) fn offered(&self) -> u64 {
        self.offered
    }

    pub(crate) fn queue_count(&self) -> u16 {
        self.device.queue_count()
    }

    /// The frontend acknowledged these features for the guest.
    pub(crate) fn negotiate(&mut self, features: u64) -> Result<(), SessionError> {
        if features & !self.offered != 0 {
            return Err(SessionError::NotOffered(features & !self.offered));
        }
        if let Some(acked) = self.acked
            && (acked ^ features) & !LOG_ALL == 0
        {
            // Logging begins and ends while rings run.
            self.acked = Some(features);
            return self.renew_dirty_logs();
        }
        if self.vrings.iter().any(|vring| vring.running) {
            return Err(SessionError::FeaturesWhileRunning);
        }
        for worker in &self.workers {
            worker.order(Order::Negotiated(features & !LOG_ALL))?;
        }
        self.acked = Some(features);
        Ok(())
    }

    pub(crate) fn set_size(&mut self, index: u32, size: u32) -> Result<(), SessionError> {
        let max = self.max_queue_size;
        let (queue, vring) = self.stopped(index)?;
        vring.size = u16::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= max)
            .ok_or(SessionError::Size { queue: queue.0, size })?;
        Ok(())
    }

    /// Says where a ring lies, and where writes to its used part are logged.
    pub(crate) fn set_addresses(
        &mut self,
        index: u32,
        to: Addresses,
        logged_at: Option<u64>,
    ) -> Result<(), SessionError> {
        let (queue, vring) = self.vring(index)?;
        if vring.running && vring.addresses != Some(to) {
            return Err(SessionError::SetUpWhileRunning { queue: queue.0 });
        }
        (vring.addresses, vring.logged_at) = (Some(to), logged_at);
        if vring.running { self.renew_dirty_log(queue) } else { Ok(()) }
    }

    pub(crate) fn set_base(&mut self, index: u32, base: u32) -> Result<(), SessionError> {
        let (queue, vring) = self.stopped(index)?;
        vring.base =
            u16::try_from(base).map_err(|_error| SessionError::Base { queue: queue.0, base })?;
        Ok(())
    }

    /// Stops the ring, once nothing is in flight on it, and gives its position.
    pub(crate) fn take_base(&mut self, index: u32) -> Result<u16, SessionError> {
        let (queue, _vring) = self.vring(index)?;
        self.stop(queue)?;
        let vring = &mut self.vrings[usize::from(queue.0)];
        if std::mem::take(&mut vring.is_whole)
            && let Some(region) = &self.inflight
        {
            // The base that the frontend gets says it all, and the next one may be of a new ring.
            region.wipe(queue.0);
        }
        vring.kick = None;
        Ok(vring.base)
    }

    pub(crate) fn set_kick(&mut self, index: u32, file: Option<File>) -> Result<(), SessionError> {
        let kick = match doorbell(file)? {
            Some(doorbell) => Kick::Rings(doorbell),
            None => Kick::Silent,
        };
        let (queue, _vring) = self.vring(index)?;
        self.stop(queue)?;
        self.vrings[usize::from(queue.0)].kick = Some(kick);
        self.start(queue)
    }

    pub(crate) fn set_call(&mut self, index: u32, file: Option<File>) -> Result<(), SessionError> {
        let call = doorbell(file)?;
        let (queue, vring) = self.vring(index)?;
        vring.call.clone_from(&call);
        if vring.running {
            self.worker(queue).order(Order::Call(queue, call))?;
        }
        Ok(())
    }

    pub(crate) fn set_err(&mut self, index: u32, file: Option<File>) -> Result<(), SessionError> {
        let err = doorbell(file)?;
        let (queue, vring) = self.vring(index)?;
        vring.err.clone_from(&err);
        if vring.running {
            self.worker(queue).order(Order::Err(queue, err))?;
        }
        Ok(())
    }

    pub(crate) fn enable(&mut self, index: u32, enabled: bool) -> Result<(), SessionError> {
        let (queue, vring) = self.vring(index)?;
        vring.enabled = enabled;
        if enabled { self.start(queue) } else { self.stop(queue) }
    }

    /// The guest reset the device: rings, settings, and all that was in flight are gone.
    pub(crate) fn reset_rings(&mut self) -> Result<(), SessionError> {
        self.forget_rings()?;
        if let Some(region) = &self.inflight {
            (0..self.queue_count()).for_each(|queue| region.wipe(queue));
        }
        for worker in &self.workers {
            worker.order(Order::Reset)?;
        }
        Ok(())
    }

    /// Stops all rings, and forgets how they were set up.
    fn forget_rings(&mut self) -> Result<(), SessionError> {
        for queue in (0..self.queue_count()).map(QueueIndex) {
            self.stop(queue)?;
            self.vrings[usize::from(queue.0)] = Vring::new(self.max_queue_size);
        }
        Ok(())
    }

    /// The frontend went: nothing of its session stays.
    pub(crate) fn end(&mut self) -> Result<(), SessionError> {
        self.forget_rings()?;
        (self.inflight, self.dirty) = (None, None);
        (self.channel, self.transfer) = (None, Transfer::None);
        (self.acked, self.agreed, self.status) = (None, 0, 0);
        self.exchange(Table::default())
    }

    /// Starts the ring if the frontend has said all that it takes.
    fn start(&mut self, queue: QueueIndex) -> Result<(), SessionError> {
        let QueueIndex(index) = queue;
        let vring = &self.vrings[usize::from(index)];
        let Some(kick) = vring.kick.clone().filter(|_kick| !vring.running) else { return Ok(()) };
        let acked = self.acked.ok_or(SessionError::Unnegotiated { queue: index })?;
        if acked & PROTOCOL_FEATURES != 0 && !vring.enabled {
            return Ok(());
        }
        let event_idx = acked & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let ring = vring
            .ring(&self.table, self.memory.memory(), event_idx)
            .and_then(|ring| self.tracked(index, ring))
            .map_err(|source| SessionError::Start { queue: index, source })?;
        let err = vring.err.clone();
        let mut ring = Box::new(ring);
        ring.log_dirty(self.dirty_log(queue));
        let order = Order::Start { queue, ring, kick, err };
        if let Answer::Refused(source) = self.worker(queue).order(order)? {
            return Err(SessionError::Kick { queue: index, source });
        }
        let vring = &mut self.vrings[usize::from(index)];
        (vring.running, vring.is_whole) = (true, false);
        Ok(())
    }

    /// Has the ring mark its chains in flight, if there is a region for it.
    fn tracked(&self, queue: u16, ring: Ring) -> Result<Ring, StartError> {
        let Some(region) = &self.inflight else { return Ok(ring) };
        let log = region.log(queue, ring.size())?;
        Ok(match log {
            Some(log) => ring.track(log),
            None => ring,
        })
    }

    fn stop(&mut self, queue: QueueIndex) -> Result<(), SessionError> {
        if !self.vrings[usize::from(queue.0)].running {
            return Ok(());
        }
        let answer = self.worker(queue).order(Order::Stop(queue))?;
        let vring = &mut self.vrings[usize::from(queue.0)];
        vring.running = false;
        if let Answer::StoppedAt(stand) = answer {
            (vring.base, vring.is_whole) = (stand.base, stand.is_whole);
        }
        Ok(())
    }

    fn worker(&self, QueueIndex(queue): QueueIndex) -> &Handle {
        &self.workers[self.worker_of[usize::from(queue)]]
    }

    fn vring(&mut self, index: u32) -> Result<(QueueIndex, &mut Vring), SessionError> {
        let queue = u16::try_from(index).map_err(|_error| SessionError::NoQueue(index))?;
        let vring = self.vrings.get_mut(usize::from(queue));
        Ok((QueueIndex(queue), vring.ok_or(SessionError::NoQueue(index))?))
    }

    /// The queue's settings, which may only change while its ring is stopped.
    fn stopped(&mut self, index: u32) -> Result<(QueueIndex, &mut Vring), SessionError> {
        let (queue, vring) = self.vring(index)?;
        if vring.running {
            return Err(SessionError::SetUpWhileRunning { queue: queue.0 });
        }
        Ok((queue, vring))
    }
}

fn doorbell(file: Option<File>) -> Result<Option<Arc<Doorbell>>, SessionError> {
    let doorbell = file.map(Doorbell::new).transpose().map_err(SessionError::Doorbell)?;
    Ok(doorbell.map(Arc::new))
}
