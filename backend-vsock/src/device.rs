//! The device: what it offers, and which of its parts serves what.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use backend_daemon::device::{
    Device, DeviceError, Interest, QueueIndex, Rings, Sources, Token, Worker,
};
use rustix::event::EventfdFlags;

use crate::connections::{Connections, Life, TakeOverError};
use crate::heritage::Heritage;
use crate::host::{Folder, Host};
use crate::packet::{Cid, EVENT_TRANSPORT_RESET};

/// Packets for the guest.
pub(crate) const RX: QueueIndex = QueueIndex(0);
/// Packets of the guest.
pub(crate) const TX: QueueIndex = QueueIndex(1);
/// Events for the guest.
const EVENT: QueueIndex = QueueIndex(2);

/// The id of a socket device (virtio 1.3, section 5).
const DEVICE_ID: u32 = 19;
/// Byte streams (virtio 1.3, section 5.10.3).
const FEATURE_STREAM: u64 = 1;
/// What QEMU sets its queues to: no message tells a frontend of a backend's limit.
const QUEUE_SIZE: u16 = 1024;

/// The length of an event.
const EVENT_BYTES: u32 = 4;

const LISTENER: Token = Token(0);
const AGAIN: Token = Token(1);

/// A virtio socket device.
#[derive(Debug)]
pub struct Vsock {
    guest: Cid,
    folder: Folder,
    connections: Option<Connections>,
}

/// Serves all queues: packets of both directions change the same connections.
#[derive(Debug)]
pub struct VsockWorker {
    connections: Connections,
    /// Written to when a call of the worker ends with work left: so that a guest that never
    /// stops sending can't keep the worker from anything else.
    again: OwnedFd,
    features: u64,
    /// Whether the rings that run are those of the guest that knows the connections. Packets are
    /// moved only then.
    is_known: bool,
}

/// What the guest has to hear in the event queue, in one word of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    /// Nothing: it was told, or has no connections to lose.
    None,
    /// All its connections are gone, since it lived on through something that this device did not.
    Reset,
    /// It was told so in the chain before this position, which may not be given back yet.
    Said(u16),
}

impl News {
    fn encode(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Reset => 1,
            Self::Said(done) => 2 << 16 | u64::from(done),
        }
    }

    fn decode(word: u64) -> Self {
        match (word >> 16, u16::try_from(word & 0xffff)) {
            (0, Ok(1)) => Self::Reset,
            (2, Ok(done)) => Self::Said(done),
            _ => Self::None,
        }
    }
}

impl Vsock {
    /// A device for the guest with this context id, with the connections that it inherits.
    ///
    /// # Errors
    ///
    /// Fails if they can't be taken up.
    pub fn new(
        guest: Cid,
        host: Host,
        folder: Folder,
        heritage: Heritage,
    ) -> Result<Self, TakeOverError> {
        let connections = Connections::new(guest, host, heritage)?;
        Ok(Self { guest, folder, connections: Some(connections) })
    }
}

impl Device for Vsock {
    type Worker = VsockWorker;

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_count(&self) -> u16 {
        3
    }

    fn max_queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn config(&self) -> Vec<u8> {
        self.guest.0.to_le_bytes().to_vec()
    }

    fn groups(&self) -> Vec<Vec<QueueIndex>> {
        vec![vec![RX, TX, EVENT]]
    }

    fn confine(&mut self) -> Result<(), DeviceError> {
        self.folder.confine().map_err(|error| DeviceError::Host {
            what: "cannot limit what the process reaches",
            source: io::Error::other(error),
        })
    }

    fn worker(&mut self, _group: usize) -> Result<VsockWorker, DeviceError> {
        let what = "cannot make the worker";
        let connections = self.connections.take().ok_or(DeviceError::Host {
            what,
            source: io::Error::other("there is one worker only"),
        })?;
        let again = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| DeviceError::Host { what, source: error.into() })?;
        Ok(VsockWorker { connections, again, features: 0, is_known: false })
    }
}

impl Worker for VsockWorker {
    fn negotiated(&mut self, features: u64) {
        self.features = features;
        self.is_known = false;
    }

    fn sources(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        sources
            .add(self.connections.listener(), LISTENER, Interest::Read)
            .and_then(|()| sources.add(self.again.as_fd(), AGAIN, Interest::Read))
            .map_err(|source| DeviceError::Host { what: "cannot poll", source })?;
        self.connections.watch_all(sources)
    }

    fn kicked(&mut self, _queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if !self.is_known {
            self.meet_guest(rings)?;
        }
        self.send_news(rings)?;
        self.pump(rings)
    }

    fn ready(&mut self, token: Token, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        match token {
            LISTENER => self.connections.accept(LISTENER, rings.sources())?,
            AGAIN => self.hear(),
            token => self.connections.ready(token, rings.sources())?,
        }
        self.pump(rings)
    }

    fn drain(&mut self, queue: QueueIndex, _rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        // Each chain is given back in the call that took it: nothing is ever in flight.
        if queue != EVENT {
            self.is_known = false;
        }
        Ok(())
    }
}

impl VsockWorker {
    fn pump(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if self.is_known && self.connections.pump(rings)? {
            rustix::io::write(&self.again, &1_u64.to_ne_bytes()).map(|_len| ()).map_err(
                |error| DeviceError::Host { what: "cannot wake the worker", source: error.into() },
            )?;
        }
        self.connections.resume_listener(LISTENER, rings.sources())
    }

    /// The rings start. A guest that goes on where it is written down that it stopped was paused,
    /// or lived through a restart of this process: its connections go on too. Otherwise it is
    /// another guest, or has set up its rings anew, or lived on through something that nobody wrote
    /// down; only in the last case it has connections to lose.
    fn meet_guest(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let mut position = |queue| Some(rings.ring(queue)?.next_avail());
        let (Some(rx), Some(tx)) = (position(RX), position(TX)) else { return Ok(()) };
        let life = Life { rx, tx, features: self.features };
        if !self.connections.are_known_to(life) {
            let news = if rx == 0 { News::None } else { News::Reset };
            self.connections.forget_guest(life, news.encode(), rings.sources())?;
        }
        self.is_known = true;
        self.connections.finish_giving(rings)
    }

    fn hear(&self) {
        let mut count = [0; 8];
        if let Err(error) = rustix::io::read(&self.again, &mut count) {
            log::trace!("woken for nothing: {error}");
        }
    }

    fn send_news(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let news = News::decode(self.connections.news());
        if !self.is_known || news == News::None {
            return Ok(());
        }
        let Some(ring) = rings.ring(EVENT) else { return Ok(()) };
        while let Some(chain) = ring.pop()? {
            let done = ring.next_avail();
            if let News::Said(said) = news {
                // By a predecessor, which may not have got as far as giving the chain back.
                if said == done {
                    ring.push(chain, EVENT_BYTES)?;
                } else {
                    ring.unpop(chain);
                }
                self.connections.set_news(News::None.encode());
                break;
            }
            if chain.write_at(0, &EVENT_TRANSPORT_RESET.to_le_bytes()).is_ok() {
                self.connections.set_news(News::Said(done).encode());
                ring.push(chain, EVENT_BYTES)?;
                self.connections.set_news(News::None.encode());
                break;
            }
            ring.push(chain, 0)?;
        }
        Ok(())
    }
}
