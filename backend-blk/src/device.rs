//! The block device: its configuration, and the worker of each of its queues.

use std::io;
use std::sync::Arc;

use backend_daemon::device::{
    Device, DeviceError, Interest, QueueIndex, Rings, Sources, Token, Worker,
};
use backend_daemon::logging::Limit;
use backend_daemon::process::Estate;
use backend_daemon::ring::Chain;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::args::EngineChoice;
use crate::blocking::Blocking;
use crate::config;
use crate::disk::{Alignment, Disk, Shown};
use crate::job::Job;
use crate::kept;
use crate::request::{HEADER_BYTES, Header, Limits, Operation, RANGE_BYTES, Status};
use crate::uring::Uring;

/// QEMU's queues have as many descriptors, whatever `queue-size` it is given; Linux asks for no
/// more.
const MAX_QUEUE_SIZE: u16 = 1024;
/// How many requests are taken at a time before orders have their turn. Enough for one system
/// call to be cheap, and few enough if each is answered at once, or blocks.
const BUDGET: usize = 64;
/// The worker's one source.
const ENDED: Token = Token(0);

/// How a disk is offered.
pub(crate) struct Setup {
    /// Padded with zeroes.
    pub(crate) serial: [u8; 20],
    pub(crate) queues: u16,
    /// A power of two, of at least 4. A frontend may still make its queues larger.
    pub(crate) queue_size: u16,
    pub(crate) engine: EngineChoice,
}

/// A disk as a virtio device.
pub struct BlockDevice {
    /// None of a stand-in.
    disk: Option<Arc<Disk>>,
    shown: Arc<Shown>,
    setup: Setup,
    /// Kept whole, since its other half hangs up with it.
    estate: Option<Estate>,
}

impl BlockDevice {
    /// A disk that is shown within these limits.
    pub(crate) fn new(disk: Disk, limits: Limits, setup: Setup, estate: Option<Estate>) -> Self {
        let shown = Arc::new(Shown::new(limits));
        Self { disk: Some(Arc::new(disk)), shown, setup, estate }
    }

    /// In the place of a disk that is gone: every request fails.
    pub(crate) fn stand_in(limits: Limits, setup: Setup, estate: Option<Estate>) -> Self {
        Self { disk: None, shown: Arc::new(Shown::new(limits)), setup, estate }
    }

    /// An engine for one queue; says once if it can't be the good one.
    fn engine(&self, say: bool) -> Engine {
        let Some(disk) = &self.disk else { return Engine::StandIn };
        if self.setup.engine == EngineChoice::Auto {
            match Uring::new(disk, self.setup.queue_size) {
                Ok(uring) => return Engine::Uring(Box::new(uring)),
                Err(error) if say => {
                    log::warn!("no io_uring, requests run one after the other: {error}");
                }
                Err(_) => {}
            }
        }
        Engine::Blocking(Blocking::new(Arc::clone(disk)))
    }

    /// How many buffers a request may have: the queue expected, but for header and status.
    fn seg_max(&self) -> u32 {
        u32::from(self.setup.queue_size - 2)
    }
}

impl Device for BlockDevice {
    type Worker = BlockWorker;

    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_count(&self) -> u16 {
        self.setup.queues
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let limits = self.shown.limits();
        [
            (VIRTIO_BLK_F_SEG_MAX, true),
            (VIRTIO_BLK_F_BLK_SIZE, true),
            (VIRTIO_BLK_F_FLUSH, true),
            (VIRTIO_BLK_F_TOPOLOGY, true),
            (VIRTIO_BLK_F_MQ, self.setup.queues > 1),
            (VIRTIO_BLK_F_RO, limits.read_only),
            (VIRTIO_BLK_F_DISCARD, limits.can_discard),
            (VIRTIO_BLK_F_WRITE_ZEROES, limits.can_zero),
        ]
        .into_iter()
        .filter(|(_bit, offered)| *offered)
        .fold(0, |features, (bit, _offered)| features | 1 << bit)
    }

    fn config(&self) -> Vec<u8> {
        config::bytes(&self.shown.limits(), self.setup.queues, self.seg_max())
    }

    fn refresh(&mut self) -> bool {
        let Some(disk) = &self.disk else { return false };
        let grown =
            disk.size_bytes().map(|bytes| self.shown.grow_to(bytes)).unwrap_or_else(|error| {
                log::warn!("cannot tell how large the disk is now: {error}");
                false
            });
        if grown {
            let size_bytes = self.shown.limits().size_bytes;
            log::info!("the disk has {size_bytes} bytes now");
            kept::grow(self.estate.as_ref(), size_bytes);
        }
        grown
    }

    fn groups(&self) -> Vec<Vec<QueueIndex>> {
        (0..self.setup.queues).map(|queue| vec![QueueIndex(queue)]).collect()
    }

    fn worker(&mut self, group: usize) -> Result<BlockWorker, DeviceError> {
        let engine = self.engine(group == 0);
        let queue = QueueIndex(u16::try_from(group).unwrap_or(u16::MAX));
        Ok(BlockWorker {
            shown: Arc::clone(&self.shown),
            alignment: self.disk.as_ref().and_then(|disk| disk.alignment),
            serial: self.setup.serial,
            queue,
            engine,
            write_through: false,
            limit: Limit::default(),
        })
    }
}

enum Engine {
    Uring(Box<Uring>),
    Blocking(Blocking),
    /// There is no disk any more.
    StandIn,
}

/// Serves one queue.
pub struct BlockWorker {
    shown: Arc<Shown>,
    /// Set if I/O is direct.
    alignment: Option<Alignment>,
    serial: [u8; 20],
    queue: QueueIndex,
    engine: Engine,
    /// The guest can't flush, so every write is stable before it is answered.
    write_through: bool,
    limit: Limit,
}

impl Worker for BlockWorker {
    fn negotiated(&mut self, features: u64) {
        self.write_through = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
    }

    fn sources(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        let Engine::Uring(uring) = &self.engine else { return Ok(()) };
        sources
            .add(uring.descriptor(), ENDED, Interest::Read)
            .map_err(|source| DeviceError::Host { what: "cannot wait for the disk", source })
    }

    fn kicked(&mut self, _queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        self.serve(rings)
    }

    fn ready(&mut self, _token: Token, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let was_full = matches!(&self.engine, Engine::Uring(uring) if uring.is_full());
        self.reap(rings)?;
        // Popping stopped for want of a place, and no kick will come for what waits.
        if was_full { self.serve(rings) } else { Ok(()) }
    }

    fn drain(&mut self, _queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        while let Engine::Uring(uring) = &mut self.engine
            && uring.in_flight() > 0
        {
            uring.wait().map_err(disk_failed)?;
            self.reap(rings)?;
        }
        Ok(())
    }
}

impl BlockWorker {
    /// Starts what the guest has made available.
    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let served = self.pop_all(rings);
        if let Engine::Uring(uring) = &mut self.engine {
            uring.submit().map_err(disk_failed)?;
        }
        served
    }

    fn pop_all(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        for _ in 0..BUDGET {
            if matches!(&self.engine, Engine::Uring(uring) if uring.is_full()) {
                return Ok(());
            }
            let Some(ring) = rings.ring(self.queue) else { return Ok(()) };
            let Some(chain) = ring.pop()? else { return Ok(()) };
            self.take(chain, rings)?;
        }
        rings.again(self.queue);
        Ok(())
    }

    /// Takes a request: answers it, or starts its job. One that parses has room for a status.
    fn take(&mut self, chain: Chain, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if matches!(self.engine, Engine::StandIn) {
            return self.answer(chain, Status::IoError, 0, rings);
        }
        match self.parse(&chain) {
            Ok(Operation::Identify) => {
                let room = usize::try_from(chain.writable_len() - 1).unwrap_or(usize::MAX);
                let serial = &self.serial[..room.min(self.serial.len())];
                let status = match chain.write_at(0, serial) {
                    Ok(()) => Status::Ok,
                    Err(_) => Status::IoError,
                };
                let len = u32::try_from(serial.len()).unwrap_or_default();
                self.answer(chain, status, len, rings)
            }
            Ok(operation) if is_empty(operation) => self.answer(chain, Status::Ok, 0, rings),
            Ok(operation) => {
                let job = Job::new(chain, operation, self.alignment, self.write_through);
                self.start(job, rings)
            }
            Err(status) => {
                if self.limit.allows() {
                    log::debug!("queue {}: a request is refused: {status:?}", self.queue.0);
                }
                self.answer(chain, status, 0, rings)
            }
        }
    }

    fn start(&mut self, mut job: Job, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        match &mut self.engine {
            Engine::Blocking(blocking) => {
                let status = blocking.finish(&mut job);
                self.end(job, status, rings)
            }
            Engine::StandIn => self.end(job, Status::IoError, rings),
            Engine::Uring(uring) => match uring.start(job) {
                Ok(()) => Ok(()),
                // It was not full when the chain was popped.
                Err(job) => self.end(*job, Status::IoError, rings),
            },
        }
    }

    /// Answers what the disk has finished.
    fn reap(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        while let Engine::Uring(uring) = &mut self.engine
            && let Some((job, status)) = uring.finished()
        {
            self.end(job, status, rings)?;
        }
        match &mut self.engine {
            Engine::Uring(uring) => uring.submit().map_err(disk_failed),
            Engine::Blocking(_) | Engine::StandIn => Ok(()),
        }
    }

    fn end(&self, job: Job, status: Status, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let (chain, written_bytes) = job.into_chain();
        self.answer(chain, status, written_bytes, rings)
    }

    /// Writes the status into the request's last byte and gives the chain back. `data_bytes` of
    /// the chain were written before the status, if it is good.
    fn answer(
        &self,
        chain: Chain,
        status: Status,
        data_bytes: u32,
        rings: &mut Rings<'_>,
    ) -> Result<(), DeviceError> {
        // A ring that the guest broke, or reset, takes no answers.
        let Some(ring) = rings.ring(self.queue) else { return Ok(()) };
        let written_bytes =
            match chain.writable_len().checked_sub(1) {
                Some(at) if chain.write_at(at, &[status.byte()]).is_ok() => {
                    if status == Status::Ok { data_bytes + 1 } else { 1 }
                }
                // There is no room for a status: the chain goes back untouched.
                _ => 0,
            };
        Ok(ring.push(chain, written_bytes)?)
    }

    fn parse(&self, chain: &Chain) -> Result<Operation, Status> {
        let mut header = [0; 16];
        chain.read_at(0, &mut header).map_err(|_short| Status::IoError)?;
        let header = Header::parse(header);
        let takes = chain.writable_len().checked_sub(1).ok_or(Status::IoError)?;
        let brings = chain.readable_len() - HEADER_BYTES;
        if !header.has_range() {
            return header.operation(brings, takes, &self.shown.limits());
        }
        let mut range = [0; 16];
        if brings != RANGE_BYTES || chain.read_at(HEADER_BYTES, &mut range).is_err() {
            return Err(Status::IoError);
        }
        header.range_operation(range, &self.shown.limits())
    }
}

/// Whether there is nothing to move, free or zero, which the kernel would call an error.
fn is_empty(operation: Operation) -> bool {
    match operation {
        Operation::Read { len_bytes, .. }
        | Operation::Write { len_bytes, .. }
        | Operation::Discard { len_bytes, .. }
        | Operation::Zero { len_bytes, .. } => len_bytes == 0,
        Operation::Flush | Operation::Identify => false,
    }
}

fn disk_failed(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "cannot hand requests to the kernel", source }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::disk::Mode;

    use super::*;

    fn device(read_only: bool) -> BlockDevice {
        let mode = Mode { read_only, direct: false, lock_wait: Duration::ZERO };
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 10).unwrap();
        let disk = Disk::adopt(file, "it", mode).unwrap();
        let engine = EngineChoice::Blocking;
        let setup = Setup { serial: [0; 20], queues: 4, queue_size: 128, engine };
        let limits = disk.limits;
        BlockDevice::new(disk, limits, setup, None)
    }

    #[test]
    fn the_configuration_has_the_specification_s_layout() {
        let device = device(false);
        let config = device.config();
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(config.len(), 60);
        assert_eq!(config[..8], 128_u64.to_le_bytes());
        assert_eq!((u32_at(12), u32_at(20)), (126, 512));
        assert_eq!((config[24], config[34]), (3, 4));
        assert_eq!((u32_at(40), u32_at(44)), (u32::from(device.shown.limits().can_discard), 1));
        assert_eq!(u32_at(52), u32::from(device.shown.limits().can_zero));
    }

    #[test]
    fn a_read_only_disk_says_so_and_offers_nothing_that_writes() {
        let features = device(true).features();
        assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(features & 1 << VIRTIO_BLK_F_DISCARD, 0);
        assert_eq!(features & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
    }
}
