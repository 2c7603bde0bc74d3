//! The device: what it offers, and which of its parts serves what.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use backend_daemon::device::{
    Device, DeviceError, Interest, QueueIndex, Rings, Sources, Token, Worker,
};
use rustix::event::EventfdFlags;

use crate::connections::Connections;
use crate::host::Host;
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
const QUEUE_SIZE: u16 = 256;

const LISTENER: Token = Token(0);
const AGAIN: Token = Token(1);

/// A virtio socket device.
#[derive(Debug)]
pub struct Vsock {
    guest: Cid,
    host: Option<Host>,
}

/// Serves all queues: packets of both directions change the same connections.
#[derive(Debug)]
pub struct VsockWorker {
    connections: Connections,
    /// Written to when a call of the worker ends with work left: so that a guest that never
    /// stops sending can't keep the worker from anything else.
    again: OwnedFd,
    /// Another guest, or the same one after a reset, may be there: it knows of no connection.
    new_session: bool,
    news: News,
}

/// Whether the guest has to hear that all its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    /// The session's RX ring, which tells, does not run yet.
    Unknown,
    /// The guest has just set up its rings and has no connections; or it was told.
    None,
    /// It lived on through a restart of this process, or through another session.
    Reset,
}

impl Vsock {
    /// A device for the guest with this context id.
    #[must_use]
    pub fn new(guest: Cid, host: Host) -> Self {
        Self { guest, host: Some(host) }
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
            new_session: false,
            news: News::Unknown,
        })
    }
}

impl Worker for VsockWorker {
    fn negotiated(&mut self, _features: u64) {
        self.new_session = true;
    }

    fn sources(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        sources
            .add(self.connections.listener(), LISTENER, Interest::Read)
            .and_then(|()| sources.add(self.again.as_fd(), AGAIN, Interest::Read))
            .map_err(|source| DeviceError::Host { what: "cannot poll", source })
    }

    fn kicked(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.new_session) {
            self.connections.forget_guest(rings.sources())?;
            self.news = News::Unknown;
        }
        if queue == RX
            && self.news == News::Unknown
            && let Some(ring) = rings.ring(RX)
        {
            self.news = if ring.next_avail() == 0 { News::None } else { News::Reset };
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
        log::debug!("queue {} stops", queue.0);
        Ok(())
    }
}

impl VsockWorker {
    fn pump(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        if self.connections.pump(rings)? {
            rustix::io::write(&self.again, &1_u64.to_ne_bytes())
                .map(|_len| ())
                .map_err(|error| DeviceError::Host {
                    what: "cannot wake the worker",
                    source: error.into(),
                })?;
        }
        self.connections.resume_listener(LISTENER, rings.sources())
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
