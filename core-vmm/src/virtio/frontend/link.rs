//! One connection to a backend, and what can go wrong on it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::channel::{Channel, ChannelError, Heard};
use super::status::{self, Stage};
use crate::virtio::watchdog::{Deadline, Watchdog};

/// Why a device has no backend (any more).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontendError {
    /// The host refused a descriptor or an eventfd.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The backend did not answer in time and was cut off.
    #[error("the backend did not {step} within {limit_ms} ms")]
    Hung {
        /// What it was to do.
        step: &'static str,
        /// How long it had.
        limit_ms: u128,
    },
    /// The backend hung up, refused, or sent something that is no answer.
    #[error("the backend did not {step}")]
    Conversation {
        /// What it was to do.
        step: &'static str,
        /// What the connection says.
        source: vhost::Error,
    },
    /// The backend hung up, refused, or sent something that is no answer, to a message about the
    /// device's status.
    #[error("the backend did not {step}")]
    Status {
        /// What it was to do.
        step: &'static str,
        /// What the connection says.
        source: io::Error,
    },
    /// The backend takes back what it has offered.
    #[error("the backend does not agree to the features that the driver chose among its own")]
    Disagrees,
    /// The backend hung up while nothing was asked of it.
    #[error("the backend hung up")]
    HungUp,
    /// The backend sent a message that nobody asked for.
    #[error("the backend sent a message unasked")]
    Unasked,
    /// The backend says what it may not, or too much of it.
    #[error("the backend misused its channel")]
    Channel(#[from] ChannelError),
    /// The backend signalled an error on a ring.
    #[error("the backend reported an error on a ring")]
    Ring,
    /// The thread that talked with the backend panicked: a bug of ours.
    #[error("the conversation with the backend panicked")]
    Panicked,
    /// The backend is of a time before virtio 1.0.
    #[error("the backend does not offer VIRTIO_F_VERSION_1 (its features are {features:#x})")]
    NoVersion1 {
        /// What it offers.
        features: u64,
    },
    /// The supervisor wants queues that the backend does not have.
    #[error("the device needs {wanted} queues, the backend has {offered}")]
    Queues {
        /// How many there are to be; at most 256.
        wanted: u64,
        /// How many the backend has.
        offered: u64,
    },
    /// The supervisor's queue size is none.
    #[error("{size} is no size for a queue")]
    QueueSize {
        /// No power of two, or above 32768.
        size: u16,
    },
    /// The supervisor's configuration is longer than vhost-user can carry.
    #[error("a configuration of {len_bytes} bytes is too long")]
    ConfigLength {
        /// How long it is.
        len_bytes: usize,
    },
    /// The memory can't be shared with a backend.
    #[error("guest memory can't be shared: {reason}")]
    Memory {
        /// Why not.
        reason: &'static str,
    },
}

/// Whether a connection that nobody uses at the moment is as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Open and silent.
    Quiet,
    /// Closed by the other end.
    Closed,
    /// Something arrived, though nothing was asked.
    Unasked,
}

/// A connection.
pub(super) struct Link {
    frontend: Frontend,
    /// The same connection, for looking at it and for cutting it off.
    socket: UnixStream,
    /// Where the backend says what it was not asked, until it closes it.
    channel: Option<Box<Channel>>,
    watchdog: Watchdog,
}

/// What `talk` gives, unless it took longer than to the deadline.
fn watched<T>(
    watchdog: &Watchdog,
    socket: &UnixStream,
    (step, deadline): (&'static str, Deadline),
    talk: impl FnOnce() -> T,
) -> Result<T, FrontendError> {
    let watch = watchdog
        .watch(socket, deadline)
        .map_err(|source| FrontendError::Host { what: "duplicate a backend's socket", source })?;
    let talked = talk();
    if watch.expired() {
        return Err(FrontendError::Hung { step, limit_ms: deadline.limit_ms() });
    }
    Ok(talked)
}

impl Link {
    pub(super) fn new(
        socket: UnixStream,
        max_queues: u16,
        watchdog: &Watchdog,
    ) -> Result<Self, FrontendError> {
        let host = |what| move |source| FrontendError::Host { what, source };
        // Whoever made it may have had other plans with it.
        socket.set_nonblocking(false).map_err(host("make a backend's socket wait"))?;
        let own = socket.try_clone().map_err(host("duplicate a backend's socket"))?;
        let frontend = Frontend::from_stream(socket, max_queues.into());
        Ok(Self { frontend, socket: own, channel: None, watchdog: watchdog.clone() })
    }

    /// Talks with the backend to make it do `step`, until `deadline`.
    pub(super) fn converse<T>(
        &mut self,
        step: &'static str,
        deadline: Deadline,
        talk: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, FrontendError> {
        let talked =
            watched(&self.watchdog, &self.socket, (step, deadline), || talk(&mut self.frontend))?;
        talked.map_err(|source| FrontendError::Conversation { step, source })
    }

    /// Tells the driver's view of the device, until `deadline`; the backend has to agree to the
    /// features, if it comes to that.
    pub(super) fn tell_status(
        &mut self,
        stage: Stage,
        acknowledged: bool,
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        let step = "take the device's status";
        let has_agreed = watched(&self.watchdog, &self.socket, (step, deadline), || {
            status::tell(&self.socket, stage, acknowledged)?;
            Ok(stage != Stage::Features || status::has_agreed(&self.socket)?)
        })?;
        match has_agreed {
            Ok(true) => Ok(()),
            Ok(false) => Err(FrontendError::Disagrees),
            Err(source) => Err(FrontendError::Status { step, source }),
        }
    }

    /// Gives the backend a channel, for which it knows the message.
    pub(super) fn open_channel(&mut self, deadline: Deadline) -> Result<(), FrontendError> {
        let host = |source| FrontendError::Host { what: "make a backend's channel", source };
        let (channel, theirs) = Channel::new().map_err(host)?;
        self.converse("take its channel", deadline, |frontend| {
            frontend.set_backend_request_fd(&theirs)
        })?;
        self.channel = Some(Box::new(channel));
        Ok(())
    }

    /// The backend's channel, if it has one.
    pub(super) fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_deref().map(AsFd::as_fd)
    }

    /// What the backend has said unasked.
    pub(super) fn hear(&mut self) -> Result<Heard, ChannelError> {
        self.channel.as_mut().map_or_else(|| Ok(Heard::default()), |channel| channel.hear())
    }

    pub(super) fn state(&self) -> LinkState {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN | PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if let Err(error) = poll(&mut fds, Some(&now)) {
            log::debug!("cannot look at a backend's socket: {error}");
            return LinkState::Quiet;
        }
        let events = fds[0].revents();
        if events.intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR) {
            LinkState::Closed
        } else if events.contains(PollFlags::IN) {
            LinkState::Unasked
        } else {
            LinkState::Quiet
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
