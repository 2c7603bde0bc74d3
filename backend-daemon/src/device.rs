//! What a device implements, with the transport taken away. Nothing here knows vhost-user.
//!
//! A [`Device`] says what stays constant and makes its [`Worker`]s. Each worker owns one group of
//! queues on one thread, so a worker needs no locks. The daemon calls a worker when the guest
//! kicks one of its queues, when one of the worker's own event sources is ready, and before a
//! queue stops. Whatever the worker pushed during a call is announced to the guest at its end.

use std::os::fd::BorrowedFd;

use crate::ring::{Ring, RingError};

/// A queue's number within its device (virtio 1.3, section 2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueIndex(pub u16);

/// A worker's own name for one of its event sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u32);

/// What a worker waits for on one of its sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// The source can be read.
    Read,
    /// The source can be written.
    Write,
    /// Either.
    ReadWrite,
    /// Only errors and hang-ups: the source stays registered but is not asked for.
    Nothing,
}

/// Why a device cannot go on. What a guest did wrong within one request is no error: the device
/// answers it in the request's own status, or drops the chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The guest left a ring in a state that no driver leaves it in; the queue stops until the
    /// guest resets the device.
    #[error("the guest broke the ring")]
    Ring(#[from] RingError),
    /// The host failed the device; the process ends and its supervisor decides.
    #[error("{what}")]
    Host {
        /// What was attempted, a lower-case fragment.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Why a state can't be saved or loaded.
pub type StateError = Box<dyn std::error::Error + Send + Sync>;

/// One virtio device.
pub trait Device: Send + 'static {
    /// Serves one group of queues.
    type Worker: Worker;

    /// The virtio device id (virtio 1.3, section 5), for example 2 for a block device.
    fn device_id(&self) -> u32;

    /// How many queues there are.
    fn queue_count(&self) -> u16;

    /// The largest size of each queue, in descriptors; a power of two (virtio 1.3, section 2.6).
    fn max_queue_size(&self) -> u16;

    /// The device-specific feature bits on offer (virtio 1.3, section 2.2). The daemon adds the
    /// ring's own (`VERSION_1`, `EVENT_IDX`, `INDIRECT_DESC`) and the transport's.
    fn features(&self) -> u64;

    /// The whole configuration space, little-endian (virtio 1.3, section 2.5).
    fn config(&self) -> Vec<u8>;

    /// The guest wrote to the configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, offset: u32, bytes: &[u8]) {
        log::debug!("ignored a write of {} bytes at {offset} of the configuration", bytes.len());
    }

    /// The host says (by SIGHUP, if the policy takes it) that what the device stands for may have
    /// changed. Gives whether the configuration space reads differently now: the frontend is told.
    fn refresh(&mut self) -> bool {
        false
    }

    /// Whether there is state that another process would need to go on in this one's place, beside
    /// what the frontend knows: what [`Device::save`] gives and [`Device::load`] takes. It is for
    /// frontends that move a guest to another host, while no ring runs.
    fn has_state(&self) -> bool {
        false
    }

    /// The state, with its version.
    ///
    /// # Errors
    ///
    /// Fails if it can't be had; the frontend is told so, and the device goes on.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    /// Takes over a state, which may be anything.
    ///
    /// # Errors
    ///
    /// Fails if it can't be read or does not fit; the device is then as it was before.
    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() { Ok(()) } else { Err("the device has no state".into()) }
    }

    /// Which queues share a worker: a partition of `0..queue_count`, one thread each.
    fn groups(&self) -> Vec<Vec<QueueIndex>>;

    /// Narrows down what the process can reach, for a device whose system calls name files: a
    /// root directory of its own, for example. Called once, after everything that the process
    /// needs by name was opened, with its original rights and before any other thread starts.
    ///
    /// # Errors
    ///
    /// Fails if the host refuses; the process then ends without having served anybody.
    fn confine(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Makes the worker of one group. Called once for each, before the jail closes.
    ///
    /// # Errors
    ///
    /// Fails if the host refuses what the worker needs.
    fn worker(&mut self, group: usize) -> Result<Self::Worker, DeviceError>;
}

/// Serves one group of queues on its own thread.
pub trait Worker: Send + 'static {
    /// A frontend negotiated `features`; called before the first ring of a session starts.
    fn negotiated(&mut self, features: u64);

    /// The guest reset the device, and its rings have stopped: what a driver had told the device is
    /// void. A frontend that says nothing of resets, or hangs up, does not make this happen.
    fn reset(&mut self) {}

    /// Registers the worker's own event sources. Called once, on the worker's thread.
    ///
    /// # Errors
    ///
    /// Fails if a source can't be registered.
    fn sources(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError>;

    /// A ring began to run (it may already hold requests), or the guest kicked it. Serve what
    /// can be served and return; pop until `None` or until a resource runs out, and no longer than
    /// a guest may be listened to at a time ([`Rings::again`]).
    ///
    /// # Errors
    ///
    /// See [`DeviceError`].
    fn kicked(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError>;

    /// One of the worker's own sources is ready.
    ///
    /// # Errors
    ///
    /// See [`DeviceError`].
    fn ready(&mut self, token: Token, rings: &mut Rings<'_>) -> Result<(), DeviceError>;

    /// The queue is about to stop: finish (and push) what is in flight on it, then return. No
    /// request may be started. The ring is still in `rings`, unless the guest broke it.
    ///
    /// # Errors
    ///
    /// See [`DeviceError`].
    fn drain(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError>;
}

/// Where a worker registers file descriptors that the daemon polls for it, level-triggered.
pub trait Sources {
    /// Adds a source.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses, or the token is taken.
    fn add(&mut self, fd: BorrowedFd<'_>, token: Token, interest: Interest) -> std::io::Result<()>;

    /// Changes what is waited for.
    ///
    /// # Errors
    ///
    /// Fails if the source was never added.
    fn modify(
        &mut self,
        fd: BorrowedFd<'_>,
        token: Token,
        interest: Interest,
    ) -> std::io::Result<()>;

    /// Removes a source; to be called before its descriptor is closed.
    ///
    /// # Errors
    ///
    /// Fails if the source was never added.
    fn remove(&mut self, fd: BorrowedFd<'_>, token: Token) -> std::io::Result<()>;
}

/// The rings of a worker's group, and its sources, for the length of one call.
pub struct Rings<'a> {
    pub(crate) rings: &'a mut [(QueueIndex, Option<Ring>)],
    pub(crate) sources: &'a mut dyn Sources,
    /// Queues that the worker asked to be called for again.
    pub(crate) again: &'a mut Vec<QueueIndex>,
}

impl Rings<'_> {
    /// The ring of `queue`, if it runs: started, enabled and not broken.
    pub fn ring(&mut self, queue: QueueIndex) -> Option<&mut Ring> {
        self.rings.iter_mut().find(|(index, _)| *index == queue)?.1.as_mut()
    }

    /// Asks for another [`Worker::kicked`] of `queue`, after orders and other events had their
    /// turn. For a worker that leaves chains in a ring: a guest that refills it as fast as it is
    /// served must not keep the worker from anything else.
    pub fn again(&mut self, queue: QueueIndex) {
        if !self.again.contains(&queue) {
            self.again.push(queue);
        }
    }

    /// The worker's event sources.
    pub fn sources(&mut self) -> &mut dyn Sources {
        self.sources
    }
}
