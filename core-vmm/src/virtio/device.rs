//! The half of a virtio device that the control thread owns: it talks with the backend.
//!
//! ```text
//!              DRIVER_OK                        any error, hang-up or time-out
//! Negotiated -----------> Running            Negotiated, Running ----> Absent (lost)
//!     ^                      |                        quiesce -------> Absent (quiesced)
//!     `------- reset --------'               Absent --reconnect--> Running, or Negotiated
//! ```
//!
//! While there is no backend the guest sees nothing but a device that takes its time: what it asks
//! for waits in its rings, a driver that becomes ready is started with the next backend, what it
//! writes to the configuration is told to the next backend, and a reset is done at once where the
//! backend was asked away or had no driver's rings.
//!
//! A backend that was lost may go on writing to the guest's memory: a process that hangs may wake
//! up, and what one that is dead had handed to the kernel may still end. A driver that was told of
//! its reset would use that memory for something else. So such a reset is done when the supervisor
//! says that all of it has ended, which is what [`VirtioDevice::reconnect`] says whether or not the
//! new backend is of any use.

mod backend;
mod handover;
mod memory;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nacre_proto::vmm::{DeviceState, DeviceStatus};
use rustix::event::epoll;
use rustix::io::Errno;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::doorbell::Doorbells;
use super::frontend::{FrontendError, Kept, LinkState, Lost, Negotiated, StartError};
use super::function::{Parts, Request, VirtioFunction};
use super::pci_registers::{Activation, ConfigWrite, PciRegisters};
use super::watchdog::Deadline;
use crate::error_chain;
use crate::interrupt::{MsiRouter, Vectors, descriptor};
use crate::pci::PciFunction;
use crate::shared_event;
use backend::Backend;
pub use handover::RequestError;

/// What a device needs of the VM.
#[derive(Clone)]
pub struct Services {
    /// Sends its interrupts.
    pub router: Arc<MsiRouter>,
    /// Takes its kicks.
    pub doorbells: Arc<dyn Doorbells>,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No descriptor is left.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Host { what, source }
}

/// A device, its function on the bus included.
pub struct VirtioDevice {
    name: String,
    function: Arc<VirtioFunction>,
    /// Always there, except while a method replaces it.
    backend: Option<Backend>,
    /// Written by vCPUs.
    wake: EventFd,
    ready: OwnedFd,
    /// The driver's queues are impossible, or it broke a ring, and it was told so; it has to reset
    /// before the next try.
    unusable: bool,
    /// How many backends came in the first one's place.
    reconnects: u64,
    /// Why the backend was lost, until somebody asks.
    loss: Option<String>,
}

impl VirtioDevice {
    /// The device behind a backend that is negotiated.
    ///
    /// # Errors
    ///
    /// Fails if no descriptor is left.
    pub fn new(backend: Negotiated, services: &Services) -> Result<Self, DeviceError> {
        let kept = backend.kept();
        let name = kept.config.id.clone();
        let wake = event()?;
        let config_event = event()?;
        let function = Arc::new(function(kept, &wake, config_event, services)?);
        let ready = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| host("make an epoll instance")(errno.into()))?;
        let fds = [descriptor(&wake), descriptor(&kept.error_event), backend.as_fd()];
        for fd in fds.into_iter().chain(backend.channel()) {
            watch(&ready, fd)?;
        }
        let backend = Some(Backend::Negotiated(backend));
        let (unusable, reconnects, loss) = (false, 0, None);
        Ok(Self { name, function, backend, wake, ready, unusable, reconnects, loss })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What to attach to the bus.
    #[must_use]
    pub fn function(&self) -> Arc<dyn PciFunction> {
        Arc::clone(&self.function) as Arc<dyn PciFunction>
    }

    /// Readable when [`VirtioDevice::process`] has something to do; it is always the same one.
    #[must_use]
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// Whether there is a backend.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(self.backend, None | Some(Backend::Absent(_)))
    }

    /// Whether nobody writes to the guest's memory on this device's behalf that the VMM could not
    /// stop: only then may a VM that was reset use that memory anew.
    #[must_use]
    pub fn is_still(&self) -> bool {
        !self.backend.as_ref().is_some_and(Backend::may_write_unwatched)
    }

    /// How the device is, which the guest finds at `address`.
    #[must_use]
    pub fn status(&self, address: &str) -> DeviceStatus {
        let state = match self.backend.as_ref().map_or(DeviceState::Lost, Backend::state) {
            DeviceState::Idle | DeviceState::Active if self.unusable => DeviceState::NeedsReset,
            state => state,
        };
        DeviceStatus {
            id: self.name.clone(),
            address: address.to_owned(),
            state,
            leaving: false,
            reconnects: self.reconnects,
        }
    }

    /// Why the backend was lost, if it was since the last time this was asked.
    pub fn take_loss(&mut self) -> Option<String> {
        self.loss.take()
    }

    /// Does what the vCPUs left to do, and looks after the backend. Never fails, and takes no
    /// longer than one conversation may: a device that loses its backend waits for another one,
    /// and the VM lives on.
    pub fn process(&mut self, memory: &GuestMemoryMmap) {
        let deadline = self.deadline();
        // Written by vCPUs alone, and non-blocking; whether it held anything does not matter.
        drop(self.wake.read());
        self.look_after_backend();
        self.hear_backend(deadline);
        let work = self.function.take_work();
        self.write_config(&work.config_writes, deadline);
        match work.request {
            Request::Nothing => {}
            Request::Start(activation) => self.start(&activation, memory, deadline),
            Request::Reset => {
                self.stop(deadline);
                if self.is_still() {
                    self.forget_driver();
                    self.function.finish_reset();
                } else {
                    log::warn!("{}: a reset waits for its lost backend's end", self.name);
                }
            }
        }
    }

    /// Back to power-on, with every vCPU stopped: the backend serves nothing, the driver is
    /// forgotten. The bus resets the configuration space. The VM may run again once
    /// [`VirtioDevice::is_still`].
    pub fn reset(&mut self) {
        self.look_after_backend();
        self.stop(self.deadline());
        self.forget_driver();
        self.function.power_on();
    }

    fn deadline(&self) -> Deadline {
        let limits = self.backend.as_ref().map(|backend| backend.kept().config.limits);
        Deadline::after(limits.unwrap_or_default().converse)
    }

    /// Notices a backend that is gone, or has something to complain of.
    pub fn look_after_backend(&mut self) {
        let Some(backend) = &self.backend else { return };
        match backend.link_state() {
            Some(LinkState::Closed) => self.give_up(FrontendError::HungUp),
            Some(LinkState::Unasked) => self.give_up(FrontendError::Unasked),
            Some(LinkState::Quiet) if shared_event::is_raised(&backend.kept().error_event) => {
                self.complain_of_ring();
            }
            Some(LinkState::Quiet) | None => {}
        }
    }

    /// The backend can't go on with a ring: it is the driver that fills them. The connection is as
    /// good as before.
    fn complain_of_ring(&mut self) {
        let Some(backend) = &self.backend else { return };
        if self.unusable {
            return;
        }
        log::warn!("{}: its backend reported an error on a ring", self.name);
        // It is looked at again after a reset: until then a backend may write as often as it likes.
        self.unwatch_backend(&[descriptor(&backend.kept().error_event)]);
        self.unusable = true;
        self.function.needs_reset();
    }

    fn start(&mut self, activation: &Activation, memory: &GuestMemoryMmap, deadline: Deadline) {
        match self.backend.take() {
            Some(Backend::Negotiated(backend)) if !self.unusable => {
                match backend.start(activation, memory, deadline) {
                    Ok(running) => {
                        log::info!("{}: the driver is ready", self.name);
                        handover::kick(&self.name, running.kept());
                        self.backend = Some(Backend::Running(running));
                    }
                    Err(StartError::Driver(backend, fault)) => {
                        log::warn!("{}: the driver's {fault}", self.name);
                        self.backend = Some(Backend::Negotiated(*backend));
                        self.unusable = true;
                        self.function.needs_reset();
                    }
                    Err(StartError::Lost(lost)) => self.lose(lost),
                }
            }
            // A driver that comes while there is no backend is started with the next one.
            other => self.backend = other,
        }
    }

    fn stop(&mut self, deadline: Deadline) {
        match self.backend.take() {
            Some(Backend::Running(backend)) => match backend.stop(deadline) {
                Ok(backend) => self.backend = Some(Backend::Negotiated(backend)),
                Err(lost) => self.lose(lost),
            },
            other => self.backend = other,
        }
    }

    /// The driver is gone and nothing of it is left with a backend.
    fn forget_driver(&mut self) {
        if let Some(backend) = &mut self.backend {
            backend.forget_driver();
        }
        if std::mem::take(&mut self.unusable)
            && let Some(backend) = &self.backend
        {
            shared_event::drain(&backend.kept().error_event);
            if self.is_alive()
                && let Err(error) = self.watch_error_event()
            {
                log::warn!("{}: {}", self.name, error_chain(&error));
            }
        }
    }

    fn write_config(&mut self, writes: &[ConfigWrite], deadline: Deadline) {
        let Some(backend) = &mut self.backend else { return };
        let written = match backend {
            Backend::Negotiated(backend) => backend.write_config(writes, deadline),
            Backend::Running(backend) => backend.write_config(writes, deadline),
            Backend::Absent(absent) => {
                absent.write_config(writes);
                return;
            }
        };
        match written {
            Ok(()) if writes.is_empty() => {}
            Ok(()) => self.function.set_config(backend.kept().configuration.bytes()),
            Err(error) => self.give_up(error),
        }
    }

    /// Tells the guest of a configuration that the backend says is another one.
    fn hear_backend(&mut self, deadline: Deadline) {
        let heard = match &mut self.backend {
            Some(Backend::Negotiated(backend)) => backend.hear(deadline),
            Some(Backend::Running(backend)) => backend.hear(deadline),
            Some(Backend::Absent(_)) | None => return,
        };
        let heard = match heard {
            Ok(heard) => heard,
            Err(error) => return self.give_up(error),
        };
        let Some(backend) = &self.backend else { return };
        if heard.new_configuration {
            log::info!("{}: its configuration may have changed", self.name);
            self.function.set_config(backend.kept().configuration.bytes());
        }
        if heard.closed {
            self.unwatch_backend(backend.channel().as_slice());
        }
    }

    fn give_up(&mut self, error: FrontendError) {
        match self.backend.take() {
            Some(Backend::Negotiated(backend)) => self.lose(backend.give_up(error)),
            Some(Backend::Running(backend)) => self.lose(backend.give_up(error)),
            absent => self.backend = absent,
        }
    }

    /// The connection is over. Closing it is not enough to be rid of its events: other processes
    /// may hold the same descriptors.
    fn lose(&mut self, lost: Lost) {
        let reason = error_chain(&lost.error);
        log::error!("{}: lost its backend: {reason}", self.name);
        self.loss = Some(reason);
        self.unwatch_backend(&[lost.as_fd()]);
        self.unwatch_backend(lost.channel().as_slice());
        let absent = lost.into_absent();
        self.unwatch_backend(&[descriptor(&absent.kept().error_event)]);
        self.backend = Some(Backend::Absent(absent));
    }

    fn watch_backend(&self) -> Result<(), DeviceError> {
        let Some(backend) = &self.backend else { return Ok(()) };
        let Some(socket) = backend.socket() else { return Ok(()) };
        for fd in [socket].into_iter().chain(backend.channel()) {
            watch(&self.ready, fd)?;
        }
        self.watch_error_event()
    }

    /// A driver that has to reset has broken its rings already.
    fn watch_error_event(&self) -> Result<(), DeviceError> {
        match &self.backend {
            Some(backend) if !self.unusable => {
                watch(&self.ready, descriptor(&backend.kept().error_event))
            }
            _ => Ok(()),
        }
    }

    fn unwatch_backend(&self, fds: &[BorrowedFd<'_>]) {
        for fd in fds {
            match epoll::delete(&self.ready, fd) {
                // An error event is not watched while the driver has to reset.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => log::warn!("{}: cannot stop watching: {error}", self.name),
            }
        }
    }
}

/// The half that goes onto the bus.
fn function(
    kept: &Kept,
    wake: &EventFd,
    config_event: EventFd,
    services: &Services,
) -> Result<VirtioFunction, DeviceError> {
    let own = |event: &EventFd| event.try_clone().map_err(host("duplicate an eventfd"));
    let sizes = vec![kept.config.queue_size; kept.vrings.len()];
    let config = kept.configuration.bytes().to_vec();
    let config_len_bytes = u16::try_from(config.len()).unwrap_or(u16::MAX);
    let writable = kept.config_is_writable();
    let mut events =
        kept.vrings.iter().map(|vring| own(&vring.call)).collect::<Result<Vec<_>, _>>()?;
    events.push(own(&config_event)?);
    let kicks = kept.vrings.iter().map(|vring| own(&vring.kick)).collect::<Result<_, _>>()?;
    Ok(VirtioFunction::new(Parts {
        name: kept.config.id.clone(),
        kind: kept.config.kind,
        registers: PciRegisters::new(kept.offered(), &sizes, config, writable),
        config_len_bytes,
        vectors: Vectors::new(&kept.config.id, Arc::clone(&services.router), events),
        kicks,
        config_event,
        wake: own(wake)?,
        doorbells: Arc::clone(&services.doorbells),
    }))
}

fn event() -> Result<EventFd, DeviceError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make an eventfd"))
}

fn watch(ready: &OwnedFd, fd: BorrowedFd<'_>) -> Result<(), DeviceError> {
    let events = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
    // Nobody reads the instance's events: which one is ready is found out by looking.
    match epoll::add(ready, fd, epoll::EventData::new_u64(0), events) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(host("watch a descriptor")(errno.into())),
    }
}

impl fmt::Debug for VirtioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioDevice")
            .field("name", &self.name)
            .field("alive", &self.is_alive())
            .finish_non_exhaustive()
    }
}
