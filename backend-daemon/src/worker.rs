//! A worker's thread: it owns the rings of one group and runs until the process ends.
//!
//! ```text
//!   protocol thread -- order --> .---------------. -- interrupt --> guest
//!                   <- answer -- | poll -> worker |
//!   guest -- kick -------------> `---------------' <-- the worker's own sources
//! ```
//!
//! Orders come through a channel and are executed between two calls of the worker, so that the
//! rings need no lock.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};

use crate::device::{DeviceError, QueueIndex, Rings, Worker};
use crate::dirty::DirtyLog;
use crate::doorbell::{Doorbell, Heard};
use crate::fault::{self, Moment};
use crate::logging::{Limit, chain};
use crate::poll::{Poll, Wake};
use crate::ring::{MemoryGuard, Ring, RingError, Stand};
use crate::vring::Kick;

/// What the protocol thread wants of a worker.
pub(crate) enum Order {
    /// The session's features are known; no ring runs.
    Negotiated(u64),
    /// The guest reset the device; no ring runs.
    Reset,
    /// Serve this ring from now on.
    Start { queue: QueueIndex, ring: Box<Ring>, kick: Kick, err: Option<Arc<Doorbell>> },
    /// Finish what is in flight and give the ring up; answered with the ring's position.
    Stop(QueueIndex),
    /// Interrupt through this descriptor from now on.
    Call(QueueIndex, Option<Arc<Doorbell>>),
    /// Report errors through this descriptor from now on.
    Err(QueueIndex, Option<Arc<Doorbell>>),
    /// Log the pages that are written through this ring from now on, or no longer.
    Dirty(QueueIndex, Option<DirtyLog>),
    /// The guest's memory changed.
    Memory(MemoryGuard),
}

/// What became of an order.
#[derive(Debug)]
pub(crate) enum Answer {
    Done,
    /// The ring stopped, and stands here.
    StoppedAt(Stand),
    Refused(io::Error),
}

/// The worker's thread is gone, and the process about to end.
#[derive(Debug, thiserror::Error)]
#[error("the worker ended")]
pub(crate) struct WorkerGone;

type Post = (Order, SyncSender<Answer>);

/// The protocol thread's end of a worker.
pub(crate) struct Handle {
    orders: Sender<Post>,
    wake: Arc<Doorbell>,
}

impl Handle {
    /// Has an order executed, and waits for it.
    pub(crate) fn order(&self, order: Order) -> Result<Answer, WorkerGone> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.orders.send((order, answer)).map_err(|_error| WorkerGone)?;
        self.wake.ring().map_err(|_error| WorkerGone)?;
        answered.recv().map_err(|_error| WorkerGone)
    }
}

/// A queue's descriptors beside its ring.
#[derive(Default)]
struct Doorbells {
    kick: Option<Arc<Doorbell>>,
    err: Option<Arc<Doorbell>>,
    /// Where the ring stood when the guest broke it.
    broken_at: Option<u16>,
}

/// A worker with all that its thread owns.
pub(crate) struct Thread<W> {
    worker: W,
    rings: Vec<(QueueIndex, Option<Ring>)>,
    doorbells: Vec<Doorbells>,
    poll: Poll,
    orders: Receiver<Post>,
    wake: Arc<Doorbell>,
    /// Queues to be served again without a kick.
    again: Vec<QueueIndex>,
    limit: Limit,
}

impl<W: Worker> Thread<W> {
    /// Prepares a worker for the queues of its group.
    pub(crate) fn new(worker: W, group: Vec<QueueIndex>) -> io::Result<(Self, Handle)> {
        let wake = Arc::new(Doorbell::make()?);
        let (orders, received) = mpsc::channel();
        let handle = Handle { orders, wake: Arc::clone(&wake) };
        let doorbells = group.iter().map(|_queue| Doorbells::default()).collect();
        let rings = group.into_iter().map(|queue| (queue, None)).collect();
        let (poll, limit) = (Poll::new()?, Limit::default());
        let again = Vec::new();
        Ok((Self { worker, rings, doorbells, poll, orders: received, wake, again, limit }, handle))
    }

    /// Registers what the thread waits for. To be called on the thread, before its jail closes.
    pub(crate) fn prepare(&mut self) -> Result<(), DeviceError> {
        self.poll
            .add(self.wake.as_fd(), Wake::Order)
            .map_err(|source| DeviceError::Host { what: "cannot wait for orders", source })?;
        self.worker.sources(&mut self.poll)
    }

    /// Serves until the host fails the worker, or the process ends.
    pub(crate) fn run(&mut self) -> Result<(), DeviceError> {
        let mut wakes = Vec::new();
        loop {
            let may_block = self.again.is_empty();
            self.poll
                .wait(&mut wakes, may_block)
                .map_err(|source| DeviceError::Host { what: "cannot wait for events", source })?;
            for wake in wakes.drain(..) {
                match wake {
                    Wake::Order => self.take_orders()?,
                    Wake::Kick(queue) => self.kicked(queue)?,
                    Wake::Source(token) if self.poll.knows(token) => {
                        self.call(None, |worker, rings| worker.ready(token, rings))?;
                    }
                    Wake::Source(_) => {}
                }
            }
            for queue in std::mem::take(&mut self.again) {
                if self.ring(queue).is_some() {
                    self.call(Some(queue), |worker, rings| worker.kicked(queue, rings))?;
                }
            }
        }
    }

    fn take_orders(&mut self) -> Result<(), DeviceError> {
        // An order is in the channel before its wake-up is written: whatever is missed here
        // wakes the loop again.
        if self.wake.hear() == Heard::Dead {
            let source = io::Error::from(io::ErrorKind::BrokenPipe);
            return Err(DeviceError::Host { what: "cannot hear orders", source });
        }
        while let Ok((order, answer)) = self.orders.try_recv() {
            let done = self.execute(order)?;
            if answer.send(done).is_err() {
                log::debug!("nobody waits for the answer to an order");
            }
        }
        Ok(())
    }

    fn execute(&mut self, order: Order) -> Result<Answer, DeviceError> {
        match order {
            Order::Negotiated(features) => self.worker.negotiated(features),
            Order::Reset => self.worker.reset(),
            Order::Start { queue, ring, kick, err } => {
                if let Err(error) = self.start(queue, *ring, kick, err) {
                    return Ok(Answer::Refused(error));
                }
                self.call(Some(queue), |worker, rings| worker.kicked(queue, rings))?;
            }
            Order::Stop(queue) => return self.stop(queue),
            Order::Call(queue, call) => {
                if let Some(ring) = self.ring(queue) {
                    ring.set_call(call);
                }
                self.call(Some(queue), |_worker, _rings| Ok(()))?;
            }
            Order::Err(queue, err) => {
                if let Some(position) = self.position(queue) {
                    self.doorbells[position].err = err;
                }
            }
            Order::Dirty(queue, dirty) => {
                if let Some(ring) = self.ring(queue) {
                    ring.log_dirty(dirty);
                }
            }
            Order::Memory(memory) => {
                for ring in self.rings.iter_mut().filter_map(|(_queue, ring)| ring.as_mut()) {
                    ring.memory = memory.clone();
                }
            }
        }
        Ok(Answer::Done)
    }

    fn start(
        &mut self,
        queue: QueueIndex,
        ring: Ring,
        kick: Kick,
        err: Option<Arc<Doorbell>>,
    ) -> io::Result<()> {
        let position = self
            .position(queue)
            .filter(|position| self.rings[*position].1.is_none())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let kick = match kick {
            Kick::Silent => None,
            Kick::Rings(doorbell) => {
                self.poll.add(doorbell.as_fd(), Wake::Kick(queue))?;
                Some(doorbell)
            }
        };
        self.doorbells[position] = Doorbells { kick, err, broken_at: None };
        self.rings[position].1 = Some(ring);
        Ok(())
    }

    fn stop(&mut self, queue: QueueIndex) -> Result<Answer, DeviceError> {
        let Some(position) = self.position(queue) else {
            return Ok(Answer::Refused(io::Error::from(io::ErrorKind::InvalidInput)));
        };
        self.unhook(position);
        // A broken queue may have requests in flight too.
        self.call(Some(queue), |worker, rings| worker.drain(queue, rings))?;
        let ring = self.rings[position].1.take();
        let broken_at = std::mem::take(&mut self.doorbells[position]).broken_at;
        let broken_at = Stand { base: broken_at.unwrap_or_default(), is_whole: true };
        Ok(Answer::StoppedAt(ring.map_or(broken_at, Ring::give_up)))
    }

    fn kicked(&mut self, queue: QueueIndex) -> Result<(), DeviceError> {
        let Some(position) = self.position(queue) else { return Ok(()) };
        let Some(kick) = &self.doorbells[position].kick else { return Ok(()) };
        if kick.hear() == Heard::Dead {
            log::warn!("queue {}: the kick descriptor is dead", queue.0);
            self.unhook(position);
        }
        self.call(Some(queue), |worker, rings| worker.kicked(queue, rings))
    }

    /// Calls the worker and announces what it pushed. A ring that the guest broke stops; `queue`
    /// is the one to blame if the worker found the fault itself.
    fn call(
        &mut self,
        queue: Option<QueueIndex>,
        what: impl FnOnce(&mut W, &mut Rings<'_>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut rings =
            Rings { rings: &mut self.rings, sources: &mut self.poll, again: &mut self.again };
        let fault = match what(&mut self.worker, &mut rings) {
            Ok(()) => None,
            Err(DeviceError::Ring(error)) => Some(error),
            Err(host) => return Err(host),
        };
        fault::pass(&Moment::Served);
        for position in 0..self.rings.len() {
            let Some(ring) = &mut self.rings[position].1 else { continue };
            if let Err(error) = ring.announce() {
                self.break_ring(position, &error);
            }
        }
        fault::pass(&Moment::Announced);
        if let Some(error) = fault {
            self.blame(queue, &error);
        }
        Ok(())
    }

    fn blame(&mut self, queue: Option<QueueIndex>, error: &RingError) {
        let broken =
            |(_, ring): &(QueueIndex, Option<Ring>)| ring.as_ref().is_some_and(Ring::is_broken);
        let known = self.rings.iter().any(broken);
        for position in 0..self.rings.len() {
            let this = &self.rings[position];
            let guilty = if known { broken(this) } else { queue.is_none_or(|it| it == this.0) };
            if guilty && this.1.is_some() {
                self.break_ring(position, error);
            }
        }
    }

    fn break_ring(&mut self, position: usize, error: &RingError) {
        let (queue, ring) = &mut self.rings[position];
        let QueueIndex(queue) = *queue;
        let ring = ring.take();
        if self.limit.allows() {
            log::warn!("queue {queue} stops until it is reset: {}", chain(error));
        }
        self.doorbells[position].broken_at = ring.map(|ring| ring.next_avail());
        self.unhook(position);
        if let Some(err) = &self.doorbells[position].err
            && let Err(error) = err.ring()
        {
            log::debug!("queue {queue}: cannot report the error: {error}");
        }
    }

    /// Stops listening for kicks.
    fn unhook(&mut self, position: usize) {
        if let Some(kick) = self.doorbells[position].kick.take()
            && let Err(error) = self.poll.remove(kick.as_fd())
        {
            log::debug!("cannot stop waiting for kicks: {error}");
        }
    }

    fn position(&self, queue: QueueIndex) -> Option<usize> {
        self.rings.iter().position(|(index, _ring)| *index == queue)
    }

    fn ring(&mut self, queue: QueueIndex) -> Option<&mut Ring> {
        let position = self.position(queue)?;
        self.rings[position].1.as_mut()
    }
}
