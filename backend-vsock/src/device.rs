//! The device: what it offers, and which of its parts serves what.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use backend_daemon::device::{
    Device, DeviceError, Interest, QueueIndex, Rings, Sources, Token, Worker,
};
use rustix::event::EventfdFlags;

use crate::connections::Connections;
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

const LISTENER: Token = Token(0);
const AGAIN: Token = Token(1);

/// A virtio socket device.
#[derive(Debug)]
pub struct Vsock {
    guest: Cid,
    folder: Folder,
    host: Option<Host>,
}

/// Serves all queues: packets of both directions change the same connections.
#[derive(Debug)]
pub struct VsockWorker {
    connections: Connections,
    /// Written to when a call of the worker ends with work left: so that a guest that never
    /// stops sending can't keep the worker from anything else.
    again: OwnedFd,
    rx: Rx,
    news: News,
}

/// What is known of the RX ring, which tells one guest's life from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rx {
    /// There is a new session, and the ring has not run in it.
    New,
    /// It runs.
    Runs,
    /// It stopped at this position.
    StoppedAt(u16),
}

/// Whether the guest has to hear that all its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    /// It was told, or has none.
    None,
    /// It lived on through a restart of this process, or through another session.
    Reset,
}

impl Vsock {
    /// A device for the guest with this context id.
    #[must_use]
    pub fn new(guest: Cid, host: Host, folder: Folder) -> Self {
        Self { guest, folder, host: Some(host) }
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
        self.folder.confine().map_err(|source| DeviceError::Host {
            what: "cannot leave all folders but one",
            source,
        })
    }

    fn worker(&mut self, _group: usize) -> Result<VsockWorker, DeviceError> {
        let what = "cannot make the worker";
        let host = self.host.take().ok_or(DeviceError::Host {
            what,
            source: io::Error::other("there is one worker only"),
        })?;
        let again = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| DeviceError::Host { what, source: error.into() })?;
        Ok(VsockWorker {
            connections: Connections::new(self.guest, host),
            again,
            rx: Rx::New,
            news: News::None,
        })
    }
}

impl Worker for VsockWorker {
    fn negotiated(&mut self, _features: u64) {
        self.rx = Rx::New;
    }

    fn sources(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        sources
            .add(self.connections.listener(), LISTENER, Interest::Read)
            .and_then(|()| sources.add(self.again.as_fd(), AGAIN, Interest::Read))
            .map_err(|source| DeviceError::Host { what: "cannot poll", source })
    }

    fn kicked(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if queue == RX && self.rx != Rx::Runs {
            self.rx_started(rings)?;
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

    fn drain(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        // Each chain is given back in the call that took it: nothing is ever in flight.
        if queue == RX {
            let position = rings.ring(RX).map(|ring| ring.next_avail());
            self.rx = position.map_or(Rx::New, Rx::StoppedAt);
        }
        Ok(())
    }
}

impl VsockWorker {
    fn pump(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if self.connections.pump(rings)? {
            rustix::io::write(&self.again, &1_u64.to_ne_bytes()).map(|_len| ()).map_err(
                |error| DeviceError::Host { what: "cannot wake the worker", source: error.into() },
            )?;
        }
        self.connections.resume_listener(LISTENER, rings.sources())
    }

    /// The RX ring starts. A guest that goes on where it stopped was paused: its connections go
    /// on too. Otherwise it is another guest, or has set up its rings anew, or lived on through
    /// something that this process did not see; only in the last case it has connections to lose.
    fn rx_started(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let Some(ring) = rings.ring(RX) else { return Ok(()) };
        let position = ring.next_avail();
        if self.rx != Rx::StoppedAt(position) {
            self.connections.forget_guest(rings.sources())?;
            self.news = if position == 0 { News::None } else { News::Reset };
        }
        self.rx = Rx::Runs;
        Ok(())
    }

    fn hear(&self) {
        let mut count = [0; 8];
        if let Err(error) = rustix::io::read(&self.again, &mut count) {
            log::trace!("woken for nothing: {error}");
        }
    }

    fn send_news(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if self.news != News::Reset {
            return Ok(());
        }
        let Some(ring) = rings.ring(EVENT) else { return Ok(()) };
        while let Some(chain) = ring.pop()? {
            let bytes = EVENT_TRANSPORT_RESET.to_le_bytes();
            let written = chain.write_at(0, &bytes).is_ok();
            ring.push(chain, if written { 4 } else { 0 })?;
            if written {
                self.news = News::None;
                break;
            }
        }
        Ok(())
    }
}
