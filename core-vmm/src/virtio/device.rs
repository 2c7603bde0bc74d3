//! The half of a virtio device that the control thread owns: it talks with the backend.
//!
//! ```text
//! DRIVER_OK -> Negotiated.start -> Running        reset -> Running.stop -> Negotiated
//! any error, hang-up or time-out -> Lost: NEEDS_RESET, the VM lives on
//! ```

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::doorbell::Doorbells;
use super::frontend::{FrontendError, Kept, LinkState, Lost, Negotiated, Running, StartError};
use super::function::{Parts, Request, VirtioFunction};
use super::pci_registers::{Activation, ConfigWrite, PciRegisters};
use crate::error_chain;
use crate::interrupt::{MsiRouter, Vectors, descriptor};
use crate::pci::PciFunction;

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
    /// A driver whose queues are impossible was told so; it has to reset before the next try.
    refused: bool,
}

enum Backend {
    Negotiated(Negotiated),
    Running(Running),
    Lost(Box<Kept>),
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
        for fd in [descriptor(&wake), descriptor(&kept.error_event), backend.as_fd()] {
            watch(&ready, fd)?;
        }
        let backend = Some(Backend::Negotiated(backend));
        Ok(Self { name, function, backend, wake, ready, refused: false })
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
        !matches!(self.backend, None | Some(Backend::Lost(_)))
    }

    /// Does what the vCPUs left to do, and looks after the backend. Never fails: a device that
    /// loses its backend tells the driver so, and the VM lives on.
    pub fn process(&mut self, memory: &GuestMemoryMmap) {
        // The eventfd is non-blocking; whether it held anything does not matter.
        drop(self.wake.read());
        self.look_after_backend();
        let work = self.function.take_work();
        for write in &work.config_writes {
            self.write_config(write);
        }
        match work.request {
            Request::Nothing => {}
            Request::Start(activation) => self.start(&activation, memory),
            Request::Reset => {
                self.stop();
                self.refused = false;
                self.function.finish_reset();
            }
        }
    }

    /// Back to power-on, with every vCPU stopped: the backend serves nothing, the driver is
    /// forgotten. The bus resets the configuration space.
    pub fn reset(&mut self) {
        self.stop();
        self.refused = false;
        self.function.power_on();
    }

    fn look_after_backend(&mut self) {
        let Some(backend) = &self.backend else { return };
        let error = match backend.link_state() {
            Some(LinkState::Closed) => FrontendError::HungUp,
            Some(LinkState::Unasked) => FrontendError::Unasked,
            Some(LinkState::Quiet) if is_readable(&backend.kept().error_event) => {
                FrontendError::Ring
            }
            Some(LinkState::Quiet) | None => return,
        };
        self.give_up(error);
    }

    fn start(&mut self, activation: &Activation, memory: &GuestMemoryMmap) {
        match self.backend.take() {
            Some(Backend::Negotiated(backend)) if !self.refused => {
                match backend.start(activation, memory) {
                    Ok(running) => {
                        log::info!("{}: the driver is ready", self.name);
                        self.backend = Some(Backend::Running(running));
                    }
                    Err(StartError::Driver(backend, outside)) => {
                        log::warn!("{}: the driver's {outside}", self.name);
                        self.backend = Some(Backend::Negotiated(*backend));
                        self.refused = true;
                        self.function.needs_reset();
                    }
                    Err(StartError::Lost(lost)) => self.lose(lost),
                }
            }
            Some(Backend::Lost(kept)) => {
                self.backend = Some(Backend::Lost(kept));
                self.function.needs_reset();
            }
            other => self.backend = other,
        }
    }

    fn stop(&mut self) {
        match self.backend.take() {
            Some(Backend::Running(backend)) => match backend.stop() {
                Ok(backend) => self.backend = Some(Backend::Negotiated(backend)),
                Err(lost) => self.lose(lost),
            },
            other => self.backend = other,
        }
    }

    fn write_config(&mut self, write: &ConfigWrite) {
        let Some(backend) = &mut self.backend else { return };
        match backend.write_config(write) {
            Ok(()) => self.function.set_config(&backend.kept().config_cache),
            Err(error) => self.give_up(error),
        }
    }

    fn give_up(&mut self, error: FrontendError) {
        match self.backend.take() {
            Some(Backend::Negotiated(backend)) => self.lose(backend.give_up(error)),
            Some(Backend::Running(backend)) => self.lose(backend.give_up(error)),
            lost => self.backend = lost,
        }
    }

    /// The connection is over. Closing it is not enough to be rid of its events: other processes
    /// may hold the same descriptors.
    fn lose(&mut self, lost: Lost) {
        log::error!("{}: lost its backend: {}", self.name, error_chain(&lost.error));
        for fd in [lost.as_fd(), descriptor(&lost.kept.error_event)] {
            if let Err(error) = epoll::delete(&self.ready, fd) {
                log::warn!("{}: cannot stop watching a descriptor: {error}", self.name);
            }
        }
        self.backend = Some(Backend::Lost(lost.kept));
        self.function.needs_reset();
    }
}

/// Whether something is in an eventfd that the backend holds too. It is looked at and not read: a
/// backend may make it blocking at any time, and the control thread must not wait for a backend.
fn is_readable(event: &EventFd) -> bool {
    let event = descriptor(event);
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready == 1)
}

impl Backend {
    fn kept(&self) -> &Kept {
        match self {
            Self::Negotiated(backend) => backend.kept(),
            Self::Running(backend) => backend.kept(),
            Self::Lost(kept) => kept,
        }
    }

    fn link_state(&self) -> Option<LinkState> {
        match self {
            Self::Negotiated(backend) => Some(backend.link_state()),
            Self::Running(backend) => Some(backend.link_state()),
            Self::Lost(_) => None,
        }
    }

    fn write_config(&mut self, write: &ConfigWrite) -> Result<(), FrontendError> {
        match self {
            Self::Negotiated(backend) => backend.write_config(write),
            Self::Running(backend) => backend.write_config(write),
            Self::Lost(_) => Ok(()),
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
    let config = kept.config_cache.clone();
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
    epoll::add(ready, fd, epoll::EventData::new_u64(0), events)
        .map_err(|errno| host("watch a descriptor")(errno.into()))
}

impl fmt::Debug for VirtioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioDevice")
            .field("name", &self.name)
            .field("alive", &self.is_alive())
            .finish_non_exhaustive()
    }
}
