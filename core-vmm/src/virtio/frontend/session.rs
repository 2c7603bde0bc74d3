//! A connection to a backend that is known, in one of two stages.

use std::fmt;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vm_memory::GuestMemoryMmap;

use super::base::Base;
use super::channel::Heard;
use super::connected::read_config;
use super::inflight::InflightRegion;
use super::kept::Kept;
use super::link::{FrontendError, Link, LinkState};
use super::memory::{self, HostLayout, QueueOutside};
use super::reconnect::{Absence, Absent, Refused};
use super::rings;
use super::status::Stage;
use crate::virtio::pci_registers::{Activation, ConfigWrite};
use crate::virtio::watchdog::Deadline;

/// A connection in stage `S`: [`Negotiated`] or [`Running`].
pub struct Session<S> {
    link: Link,
    kept: Box<Kept>,
    stage: PhantomData<S>,
}

/// The stage of a backend that is known and has nothing to do.
#[derive(Debug)]
pub enum Idle {}

/// The stage of a backend that serves its rings.
#[derive(Debug)]
pub enum Serving {}

/// The guest may not have found the device yet, or has reset it.
pub type Negotiated = Session<Idle>;

/// The rings are served.
pub type Running = Session<Serving>;

/// A connection that is over, and what outlives it.
pub struct Lost {
    /// Why it is over.
    pub error: FrontendError,
    kept: Box<Kept>,
    /// Closed when this is dropped; until then it can be taken out of where it is watched.
    link: Link,
}

/// What is wrong with what a driver set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverFault {
    /// A queue is impossible.
    #[error(transparent)]
    Queue(#[from] QueueOutside),
    /// A backend that came meanwhile does not have all that the driver was offered.
    #[error("features {missing:#x} are no more on offer")]
    Features {
        /// Those.
        missing: u64,
    },
}

/// Why a backend did not start.
#[derive(Debug)]
pub enum StartError {
    /// What the driver set up is impossible; the connection is as it was.
    Driver(Box<Negotiated>, DriverFault),
    /// The connection is over.
    Lost(Lost),
}

impl<S> Session<S> {
    pub(super) fn new(link: Link, kept: Box<Kept>) -> Self {
        Self { link, kept, stage: PhantomData }
    }

    /// The connection, and what outlives it.
    pub(super) fn parts(&mut self) -> (&mut Link, &mut Kept) {
        (&mut self.link, &mut self.kept)
    }

    /// What outlives the connection.
    #[must_use]
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Whether the backend is still there.
    #[must_use]
    pub fn link_state(&self) -> LinkState {
        self.link.state()
    }

    /// Gives the connection up.
    #[must_use]
    pub fn give_up(self, error: FrontendError) -> Lost {
        Lost { kept: self.kept, error, link: self.link }
    }

    /// Where the backend says what it was not asked, if it can.
    #[must_use]
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.link.channel()
    }

    /// Hears what the backend says unasked. If its configuration is another one that is read, and
    /// told as new if the backend could give it.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost, or the backend says what it may not.
    pub fn hear(&mut self, deadline: Deadline) -> Result<Heard, FrontendError> {
        let mut heard = self.link.hear()?;
        if heard.new_configuration {
            let config = read_config(&mut self.link, &self.kept, deadline)?;
            let set = config.map(|config| self.kept.configuration.set(config));
            heard.new_configuration = set.is_some();
        }
        Ok(heard)
    }

    /// Hands writes of the driver to the configuration on, and reads back what became of them.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost.
    pub fn write_config(
        &mut self,
        writes: &[ConfigWrite],
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        if writes.is_empty() || !self.kept.config_is_writable() {
            return Ok(());
        }
        for write in writes {
            self.kept.configuration.write(write);
        }
        write_config(&mut self.link, writes, deadline)?;
        if let Some(config) = read_config(&mut self.link, &self.kept, deadline)? {
            self.kept.configuration.set(config);
        }
        Ok(())
    }
}

impl Negotiated {
    /// The driver is ready: hands memory and rings to the backend.
    ///
    /// # Errors
    ///
    /// Fails if what the driver set up is impossible, or the connection is lost.
    pub fn start(
        mut self,
        activation: &Activation,
        memory: &GuestMemoryMmap,
        deadline: Deadline,
    ) -> Result<Running, StartError> {
        let missing = activation.features & !self.kept.offered();
        if missing != 0 {
            return Err(StartError::Driver(Box::new(self), DriverFault::Features { missing }));
        }
        let layouts = match self.kept.place(memory, activation) {
            Ok(Ok(layouts)) => layouts,
            Ok(Err(outside)) => return Err(StartError::Driver(Box::new(self), outside.into())),
            Err(error) => return Err(StartError::Lost(self.give_up(error))),
        };
        let (link, kept) = (&mut self.link, &mut *self.kept);
        kept.take_driver(activation);
        let bases: Vec<_> = layouts.iter().map(|layout| layout.as_ref().map(|_| 0)).collect();
        let started = track(link, kept, deadline)
            .and_then(|()| serve(link, kept, &layouts, &bases, deadline));
        match started {
            Ok(()) => Ok(Session::new(self.link, self.kept)),
            Err(error) => Err(StartError::Lost(self.give_up(error))),
        }
    }

    /// A driver that never got as far as its rings, or whose rings no backend would serve, has reset
    /// the device.
    pub fn forget_driver(&mut self) {
        self.kept.forget_driver();
    }

    /// Hangs up; there is nothing to drain.
    #[must_use]
    pub fn dismiss(self) -> Absent {
        Absent::new(self.kept, Absence::Quiesced)
    }
}

impl Running {
    /// The driver resets the device: ends what is in flight and stops the rings. The connection
    /// stays.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost.
    pub fn stop(mut self, deadline: Deadline) -> Result<Negotiated, Lost> {
        let kept = &mut *self.kept;
        let stopped = self
            .link
            .converse("stop", deadline, |frontend| rings::stop(frontend, kept))
            .and_then(|()| tell_status(&mut self.link, kept, Stage::Reset, deadline));
        match stopped {
            Ok(()) => {
                kept.forget_driver();
                Ok(Session::new(self.link, self.kept))
            }
            Err(error) => Err(self.give_up(error)),
        }
    }

    /// Ends what is in flight, keeps where each ring stopped, and hangs up.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost meanwhile.
    pub fn quiesce(mut self, deadline: Deadline) -> Result<Absent, Lost> {
        let kept = &mut *self.kept;
        match self.link.converse("drain its rings", deadline, |f| rings::drain(f, kept)) {
            Ok(()) => Ok(Absent::new(self.kept, Absence::Quiesced)),
            Err(error) => {
                // Some rings may have gone on.
                kept.bases_are_unknown();
                Err(self.give_up(error))
            }
        }
    }
}

impl Lost {
    /// What waits for another backend.
    ///
    /// Where it had a driver's rings it may go on writing to the guest's memory, even if it has hung
    /// up: what it had handed to the kernel can end after the process, reads from a disk included.
    #[must_use]
    pub fn into_absent(self) -> Absent {
        let may_write = self.kept.has_driver();
        Absent::new(self.kept, Absence::Lost { may_write })
    }

    /// The same for one that was to come in another's place.
    pub(super) fn into_refused(self) -> Refused {
        let may_write = self.kept.has_driver();
        let absent = Absent::new(self.kept, Absence::Lost { may_write });
        Refused { absent, error: self.error.into() }
    }
}

impl Kept {
    /// Where the driver's queues are mapped here, in `memory`, whose regions are kept.
    pub(super) fn place(
        &mut self,
        memory: &GuestMemoryMmap,
        activation: &Activation,
    ) -> Result<Result<Vec<Option<HostLayout>>, QueueOutside>, FrontendError> {
        self.memory = memory::regions(memory)?;
        let place = |(queue, layout): (usize, &Option<_>)| {
            let host = layout.as_ref().map(|layout| memory::host_layout(&self.memory, layout));
            host.map(|host| host.ok_or(QueueOutside { queue })).transpose()
        };
        Ok(activation.queues.iter().enumerate().map(place).collect())
    }

    pub(super) fn bases_are_unknown(&mut self) {
        for vring in &mut self.vrings {
            vring.base = Base::Unknown;
        }
    }
}

/// Has the backend make a region for what is in flight, if it can.
pub(super) fn track(
    link: &mut Link,
    kept: &mut Kept,
    deadline: Deadline,
) -> Result<(), FrontendError> {
    if !kept.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
        return Ok(());
    }
    let queues = u16::try_from(kept.vrings.len()).unwrap_or(u16::MAX);
    let size = kept.config.queue_size;
    let region = link.converse("make room to mark requests in flight", deadline, |frontend| {
        InflightRegion::ask(frontend, queues, size)
    })?;
    kept.inflight = Some(region);
    Ok(())
}

/// Sets the rings up and starts them. From then on nobody but the backend knows where they are.
pub(super) fn serve(
    link: &mut Link,
    kept: &mut Kept,
    layouts: &[Option<HostLayout>],
    bases: &[Option<u16>],
    deadline: Deadline,
) -> Result<(), FrontendError> {
    link.converse("take the features", deadline, |frontend| rings::set_features(frontend, kept))?;
    tell_status(link, kept, Stage::Features, deadline)?;
    link.converse("set its rings up", deadline, |frontend| {
        rings::set_up(frontend, kept, layouts, bases)
    })?;
    kept.bases_are_unknown();
    link.converse("start its rings", deadline, |frontend| rings::start(frontend, kept))?;
    tell_status(link, kept, Stage::Ready, deadline)
}

/// Tells the driver's view of the device, if the backend takes it.
fn tell_status(
    link: &mut Link,
    kept: &Kept,
    stage: Stage,
    deadline: Deadline,
) -> Result<(), FrontendError> {
    if !kept.has(VhostUserProtocolFeatures::STATUS) {
        return Ok(());
    }
    link.tell_status(stage, kept.has(VhostUserProtocolFeatures::REPLY_ACK), deadline)
}

/// Hands writes to the configuration on.
pub(super) fn write_config(
    link: &mut Link,
    writes: &[ConfigWrite],
    deadline: Deadline,
) -> Result<(), FrontendError> {
    link.converse("take writes to its configuration", deadline, |frontend| {
        writes.iter().try_for_each(|write| {
            frontend.set_config(write.offset, VhostUserConfigFlags::empty(), &write.bytes)
        })
    })
}

impl<S> AsFd for Session<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

impl Lost {
    /// Where the backend said what it was not asked, if it could.
    #[must_use]
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.link.channel()
    }
}

impl AsFd for Lost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

impl<S> fmt::Debug for Session<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lost").field("error", &self.error).finish_non_exhaustive()
    }
}
