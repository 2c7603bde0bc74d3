//! How one backend goes and another comes, as the supervisor wants it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::{DeviceError, VirtioDevice};
use crate::interrupt::descriptor;
use crate::virtio::frontend::{Kept, ReconnectError, Reconnected, Vring};
use crate::virtio::watchdog::Deadline;
use crate::{error_chain, shared_event};

/// Why a device did not do what the supervisor wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// It has a backend, and that one is fine.
    #[error("it has a backend")]
    Served,
    /// It has no backend.
    #[error("it has no backend")]
    Absent,
    /// The new backend can't take the place of the old one.
    #[error(transparent)]
    Reconnect(#[from] ReconnectError),
    /// A backend was lost over it.
    #[error("it lost its backend: {reason}")]
    Lost {
        /// Why.
        reason: String,
    },
    /// The host is at its end.
    #[error(transparent)]
    Host(#[from] DeviceError),
}

impl VirtioDevice {
    /// Gives the device the backend at the other end of `socket` in place of one that is absent,
    /// and whose process has ended.
    ///
    /// # Errors
    ///
    /// Fails if the device has a backend, or the new one does not fit. The device is as it was.
    pub fn reconnect(
        &mut self,
        socket: UnixStream,
        memory: &GuestMemoryMmap,
    ) -> Result<(), RequestError> {
        self.look_after_backend();
        if self.is_alive() {
            return Err(RequestError::Served);
        }
        // What the driver has asked for meanwhile, such as a reset, comes first.
        self.predecessor_ended(memory);
        let Some(Backend::Absent(absent)) = self.backend.take() else {
            return Err(RequestError::Served);
        };
        let deadline = Deadline::after(absent.kept().config.limits.reconnect);
        shared_event::drain(&absent.kept().error_event);
        match absent.reconnect(socket, memory, !self.unusable, deadline) {
            Ok(Reconnected::Negotiated(backend)) => {
                self.backend = Some(Backend::Negotiated(backend));
            }
            Ok(Reconnected::Running(backend)) => {
                nudge(&self.name, backend.kept());
                self.backend = Some(Backend::Running(backend));
            }
            Err(refused) => {
                self.backend = Some(Backend::Absent(refused.absent));
                return Err(refused.error.into());
            }
        }
        self.reconnects += 1;
        log::info!("{}: another backend took over", self.name);
        self.watch_backend()?;
        if let Some(backend) = &self.backend {
            self.function.restrict_offer(backend.kept().offered());
            self.function.set_config(backend.kept().configuration.bytes());
        }
        // A driver that became ready while there was no backend.
        self.process(memory);
        match &self.loss {
            Some(reason) if !self.is_alive() => Err(RequestError::Lost { reason: reason.clone() }),
            _ => Ok(()),
        }
    }

    /// The process that was the backend of a device without one has ended, and so has what it had
    /// asked the kernel for. A reset that the driver waits for is done then.
    pub fn predecessor_ended(&mut self, memory: &GuestMemoryMmap) {
        if let Some(Backend::Absent(absent)) = &mut self.backend {
            absent.predecessor_ended();
            self.process(memory);
        }
    }

    /// Ends what is in flight and hangs up: the backend may be replaced.
    ///
    /// # Errors
    ///
    /// Fails if there is no backend, or it is lost over it.
    pub fn quiesce(&mut self) -> Result<(), RequestError> {
        self.look_after_backend();
        let deadline = self.deadline();
        let absent = match self.backend.take() {
            Some(Backend::Negotiated(backend)) => {
                self.unwatch_backend(&[backend.as_fd(), descriptor(&backend.kept().error_event)]);
                backend.dismiss()
            }
            Some(Backend::Running(backend)) => {
                self.unwatch_backend(&[backend.as_fd(), descriptor(&backend.kept().error_event)]);
                match backend.quiesce(deadline) {
                    Ok(absent) => absent,
                    Err(lost) => {
                        let reason = error_chain(&lost.error);
                        self.lose(lost);
                        return Err(RequestError::Lost { reason });
                    }
                }
            }
            absent => {
                self.backend = absent;
                return Err(RequestError::Absent);
            }
        };
        log::info!("{}: its backend stopped", self.name);
        self.backend = Some(Backend::Absent(absent));
        Ok(())
    }
}

/// Has both sides look at every ring: a kick or an interrupt may have been lost with a backend.
fn nudge(name: &str, kept: &Kept) {
    kick(name, kept);
    raise(name, kept, |vring| &vring.call);
}

/// Has the backend look at every ring. The driver may kick as soon as it has said that it is ready,
/// and there are backends that drop a kick which comes before the ring is enabled (among them
/// Debian 13's virtiofsd).
pub(super) fn kick(name: &str, kept: &Kept) {
    raise(name, kept, |vring| &vring.kick);
}

fn raise(name: &str, kept: &Kept, event: impl Fn(&Vring) -> &EventFd) {
    for vring in kept.vrings.iter().filter(|vring| vring.layout.is_some()) {
        if let Err(error) = shared_event::raise(event(vring)) {
            log::warn!("{name}: cannot signal an eventfd: {error}");
        }
    }
}
