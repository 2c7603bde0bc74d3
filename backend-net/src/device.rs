//! The device: features and configuration, and a worker for each pair of queues.
//!
//! Queue `2n` receives and queue `2n + 1` transmits for pair `n`; the control queue comes last and
//! exists only with several pairs. A driver that has not taken `MQ` knows of one pair, and for it
//! the control queue is number 2 (virtio 1.3, section 5.1.2). A pair is one thread with one tap
//! queue. What the thread waits for on the tap:
//!
//! ```text
//!   guest has buffers ----> readable        tap full ----> writable (frames stay in the queue)
//!   guest has none -------> not asked for   tap gone ----> the process ends
//! ```

use std::os::fd::AsFd;
use std::sync::Arc;

use backend_daemon::device::{
    Device, DeviceError, Interest, QueueIndex, Rings, Sources, StateError, Token, Worker,
};
use backend_daemon::process::{BuildError, inherited_fd};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use crate::args::{Args, Mac};
use crate::control;
use crate::header::{Features, HEADER_BYTES, LEGACY_HEADER_BYTES};
use crate::kept::Kept;
use crate::pairs::Pairs;
use crate::receive::{Received, Receiver};
use crate::tap::{self, Offloads, Tap};
use crate::transmit::{Sent, Transmitter};

/// The virtio device id of a network device (virtio 1.3, section 5.1.1).
const DEVICE_ID: u32 = 1;
/// Linux asks for no more than 1024 and gains nothing from it; a chain may be indirect anyway.
const MAX_QUEUE_SIZE: u16 = 1024;

const TAP: Token = Token(0);
const BELL: Token = Token(1);

/// A network device whose tap is open.
#[derive(Debug)]
pub struct NetDevice {
    taps: Vec<Option<Tap>>,
    offloads: Offloads,
    mac: Option<Mac>,
    mtu: Option<u16>,
    pairs: Arc<Pairs>,
}

impl NetDevice {
    /// Opens what the arguments name.
    ///
    /// # Errors
    ///
    /// Fails if the arguments contradict each other, or if the tap can't be had.
    pub fn open(args: &Args) -> Result<Self, BuildError> {
        let taps = match &args.tap {
            Some(name) => tap::open(name.as_str(), usize::from(args.queue_pairs)),
            None => {
                if args.tap_fd.len() != usize::from(args.queue_pairs) {
                    let (fds, pairs) = (args.tap_fd.len(), args.queue_pairs);
                    let usage = format!("--tap-fd names {fds} descriptors for {pairs} queue pairs");
                    return Err(BuildError::Usage(usage));
                }
                let fds = args.tap_fd.iter().map(|number| inherited_fd(*number));
                tap::inherited(fds.collect::<Result<_, _>>().map_err(BuildError::resource)?)
            }
        };
        Self::new(taps.map_err(BuildError::resource)?, args)
    }

    fn new(taps: Vec<Tap>, args: &Args) -> Result<Self, BuildError> {
        let offloads = match taps.first() {
            Some(tap) => tap.probe_offloads().map_err(BuildError::resource)?,
            None => Offloads::default(),
        };
        for tap in taps.iter().skip(1) {
            // The interface spreads frames over all attached queues; the guest starts with one.
            tap.set_attached(false).map_err(BuildError::resource)?;
        }
        let estate = args.daemon.estate().map_err(BuildError::resource)?;
        let pairs = Arc::new(Pairs::new(args.queue_pairs, estate)?);
        let taps = taps.into_iter().map(Some).collect();
        Ok(Self { taps, offloads, mac: args.mac, mtu: args.mtu, pairs })
    }

    fn has_control_queue(&self) -> bool {
        self.pairs.count() > 1
    }
}

impl Device for NetDevice {
    type Worker = NetWorker;

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_count(&self) -> u16 {
        2 * self.pairs.count() + u16::from(self.has_control_queue())
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            // The tap takes segments and unfinished checksums from us whatever it gives.
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ];
        bits.extend(self.mac.map(|_| VIRTIO_NET_F_MAC));
        bits.extend(self.mtu.map(|_| VIRTIO_NET_F_MTU));
        bits.extend(self.offloads.udp_segments().then_some(VIRTIO_NET_F_HOST_USO));
        if self.has_control_queue() {
            bits.extend([VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ]);
        }
        bits.iter().fold(self.offloads.features(), |all, bit| all | 1 << bit)
    }

    fn config(&self) -> Vec<u8> {
        let mut config = Vec::new();
        config.extend(self.mac.map_or([0; 6], Mac::bytes));
        let [low, high, ..] = VIRTIO_NET_S_LINK_UP.to_le_bytes();
        config.extend([low, high]);
        config.extend(self.pairs.count().to_le_bytes());
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn has_state(&self) -> bool {
        self.has_control_queue()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Kept::save(self.pairs.active()))
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.pairs.set_active(Kept::load(state, self.pairs.count())?);
        Ok(())
    }

    fn groups(&self) -> Vec<Vec<QueueIndex>> {
        let pair = |pair| vec![QueueIndex(2 * pair), QueueIndex(2 * pair + 1)];
        let mut groups: Vec<Vec<QueueIndex>> = (0..self.pairs.count()).map(pair).collect();
        if self.has_control_queue() {
            groups[0].push(QueueIndex(2 * self.pairs.count()));
        }
        groups
    }

    fn worker(&mut self, group: usize) -> Result<NetWorker, DeviceError> {
        let tap = self.taps.get_mut(group).and_then(Option::take);
        let missing = || DeviceError::Host {
            what: "give a worker its tap queue",
            source: std::io::ErrorKind::NotFound.into(),
        };
        let tap = tap.ok_or_else(missing)?;
        let pair = u16::try_from(group).map_err(|_too_many| missing())?;
        Ok(NetWorker {
            tap,
            pair,
            pairs: Arc::clone(&self.pairs),
            features: Features::default(),
            receiver: Receiver::new(),
            transmitter: Transmitter::new(),
            attached: pair == 0,
            waits: Waits::default(),
            registered: Interest::Nothing,
        })
    }
}

/// What a worker waits for on its tap.
#[derive(Clone, Copy, Debug, Default)]
struct Waits {
    /// The guest has buffers for frames.
    frames: bool,
    /// The guest has frames that the tap did not take.
    room: bool,
}

impl Waits {
    fn interest(self) -> Interest {
        match (self.frames, self.room) {
            (false, false) => Interest::Nothing,
            (true, false) => Interest::Read,
            (false, true) => Interest::Write,
            (true, true) => Interest::ReadWrite,
        }
    }
}

/// Serves one pair of queues, the first one also the control queue.
pub struct NetWorker {
    tap: Tap,
    pair: u16,
    pairs: Arc<Pairs>,
    features: Features,
    receiver: Receiver,
    transmitter: Transmitter,
    /// Whether the interface uses this tap queue. The first pair's always is.
    attached: bool,
    waits: Waits,
    /// What the daemon polls the tap for, if attached.
    registered: Interest,
}

impl NetWorker {
    fn receive_queue(&self) -> QueueIndex {
        QueueIndex(2 * self.pair)
    }

    fn transmit_queue(&self) -> QueueIndex {
        QueueIndex(2 * self.pair + 1)
    }

    /// The control queue of a driver that did not take `MQ` is what else is a pair's own.
    fn is_control(&self, QueueIndex(queue): QueueIndex) -> bool {
        let pairs = if self.features.has(VIRTIO_NET_F_MQ) { self.pairs.count() } else { 1 };
        self.features.has(VIRTIO_NET_F_CTRL_VQ) && queue == 2 * pairs
    }

    fn serve_control(
        &mut self,
        queue: QueueIndex,
        rings: &mut Rings<'_>,
    ) -> Result<(), DeviceError> {
        let most = if self.features.has(VIRTIO_NET_F_MQ) { self.pairs.count() } else { 0 };
        let Some(ring) = rings.ring(queue) else { return Ok(()) };
        if control::serve(ring, &self.pairs, most)? {
            rings.again(queue);
        }
        Ok(())
    }

    fn receive(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let Some(ring) = rings.ring(self.receive_queue()) else {
            self.waits.frames = false;
            return Ok(());
        };
        if self.attached {
            // With the budget used up the tap stays readable, so the worker comes back.
            self.waits.frames = self.receiver.receive(ring, &self.tap)? != Received::NoBuffers;
        }
        Ok(())
    }

    fn transmit(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        self.waits.room = false;
        if !self.attached {
            let Some(ring) = rings.ring(self.transmit_queue()) else { return Ok(()) };
            let Some(chain) = ring.pop()? else { return Ok(()) };
            ring.unpop(chain);
            // Who sends on a pair uses it: if this process was replaced, nobody repeats the
            // command that said so.
            self.pairs.set_active(self.pairs.active().max(self.pair + 1));
            self.attach(true, rings.sources())?;
        }
        let Some(ring) = rings.ring(self.transmit_queue()) else { return Ok(()) };
        match self.transmitter.send(ring, &self.tap)? {
            Sent::All => {}
            Sent::Blocked => self.waits.room = true,
            Sent::Some => rings.again(self.transmit_queue()),
        }
        Ok(())
    }

    /// Attaches or detaches the tap queue as the guest wants it.
    fn follow_pairs(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        // Without a control queue a pair is in use as long as its receive queue runs.
        let chosen = self.pair < self.pairs.active() || !self.features.has(VIRTIO_NET_F_CTRL_VQ);
        let runs = rings.ring(self.receive_queue()).is_some();
        self.attach(chosen && runs || self.pair == 0, rings.sources())
    }

    fn attach(&mut self, wanted: bool, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        if wanted == self.attached {
            return Ok(());
        }
        let failed = |source| DeviceError::Host { what: "attach or detach a tap queue", source };
        if wanted {
            self.tap.set_attached(true).map_err(failed)?;
            self.registered = self.waits.interest();
            sources.add(self.tap.as_fd(), TAP, self.registered).map_err(failed)?;
        } else {
            // A detached queue is always ready, with an error.
            sources.remove(self.tap.as_fd(), TAP).map_err(failed)?;
            self.tap.set_attached(false).map_err(failed)?;
        }
        self.attached = wanted;
        Ok(())
    }

    /// Tells the daemon what to wait for now.
    fn wait(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let interest = self.waits.interest();
        if self.attached && interest != self.registered {
            let modified = rings.sources().modify(self.tap.as_fd(), TAP, interest);
            let failed = |source| DeviceError::Host { what: "wait for the tap", source };
            modified.map_err(failed)?;
            self.registered = interest;
        }
        Ok(())
    }
}

impl Worker for NetWorker {
    fn negotiated(&mut self, features: u64) {
        self.features = Features(features);
        let modern = self.features.has(VIRTIO_F_VERSION_1);
        let merged = self.features.has(VIRTIO_NET_F_MRG_RXBUF);
        let header_len = if modern || merged { HEADER_BYTES } else { LEGACY_HEADER_BYTES };
        self.receiver.negotiated(self.features, header_len);
        self.transmitter.negotiated(self.features, header_len);
        if !self.features.has(VIRTIO_NET_F_MQ) {
            self.pairs.set_active(1);
        }
        if self.pair > 0 {
            // Header and offloads belong to the interface; its first queue sets them.
            return;
        }
        let offloads = Offloads::for_driver(self.features);
        let set = self.tap.set_header_len(header_len).and(self.tap.set_offloads(offloads));
        if let Err(error) = set {
            // Frames that the driver can't take are dropped one by one; a lost tap shows there.
            log::error!("cannot tell the tap what was negotiated: {error}");
        }
    }

    fn reset(&mut self) {
        self.pairs.set_active(1);
    }

    fn sources(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Host { what: "register the tap", source };
        if let Some(bell) = self.pairs.bell(self.pair) {
            sources.add(bell, BELL, Interest::Read).map_err(failed)?;
        }
        if self.attached {
            sources.add(self.tap.as_fd(), TAP, self.registered).map_err(failed)?;
        }
        Ok(())
    }

    fn kicked(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if self.is_control(queue) {
            self.serve_control(queue, rings)?;
        } else if queue == self.receive_queue() {
            self.follow_pairs(rings)?;
            self.receive(rings)?;
        } else if queue == self.transmit_queue() {
            self.transmit(rings)?;
        }
        self.wait(rings)
    }

    fn ready(&mut self, token: Token, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if token == BELL {
            self.pairs.silence(self.pair);
            self.follow_pairs(rings)?;
            self.receive(rings)?;
            self.transmit(rings)?;
        } else if self.waits.frames || self.waits.room {
            self.receive(rings)?;
            self.transmit(rings)?;
        } else {
            // Ready although nothing was asked for: an error, most likely the interface's end.
            let gone = |source| DeviceError::Host { what: "keep the tap", source };
            self.tap.check().map_err(gone)?;
        }
        self.wait(rings)
    }

    fn drain(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        // Every frame is finished within its call, but for one that waits for buffers.
        if queue == self.receive_queue() {
            if let Some(ring) = rings.ring(queue) {
                self.receiver.abandon(ring);
            }
            self.waits.frames = false;
            self.attach(self.pair == 0, rings.sources())?;
        } else if queue == self.transmit_queue() {
            self.waits.room = false;
        }
        self.wait(rings)
    }
}
