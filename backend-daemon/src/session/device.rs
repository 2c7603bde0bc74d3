//! What concerns the device as a whole: its configuration, its status, and its state on its way to
//! another process.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::retry_on_intr;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::VhostTransferStateDirection;

use super::{PROTOCOL_FEATURES, Session, SessionError};
use crate::beside::{Channel, Message, What};
use crate::device::{Device, StateError};
use crate::logging::chain;

/// `FEATURES_OK` (virtio 1.3, section 2.1).
const FEATURES_OK: u64 = 8;
/// More state than any device has.
const MOST_STATE_BYTES: u64 = 1 << 30;

/// A device's state on its way. It moves after the answer to the message that asked for it: who
/// asked reads or writes the other end then.
#[derive(Debug, Default)]
pub(super) enum Transfer {
    /// Nobody asked.
    #[default]
    None,
    Wanted(VhostTransferStateDirection, File),
    Done,
    Failed,
}

impl<D: Device> Session<D> {
    pub(crate) fn has_config(&self) -> bool {
        !self.device.config().is_empty()
    }

    /// A piece of the configuration space; behind its end it reads as zero, since a frontend may
    /// know a longer layout.
    pub(crate) fn config(&self, offset: u32, len_bytes: u32) -> Vec<u8> {
        let (offset, len_bytes) = (offset as usize, len_bytes as usize);
        let config = self.device.config();
        config.into_iter().skip(offset).chain(std::iter::repeat(0)).take(len_bytes).collect()
    }

    pub(crate) fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), SessionError> {
        let len_bytes = bytes.len();
        let end = u64::from(offset) + len_bytes as u64;
        if end > self.device.config().len() as u64 {
            return Err(SessionError::Config { offset, len_bytes });
        }
        self.device.write_config(offset, bytes);
        Ok(())
    }

    /// Has the device look again at what it stands for, and tells the frontend what came of it.
    pub(crate) fn refresh(&mut self) {
        if self.device.refresh()
            && let Some(channel) = &self.channel
            && let Err(error) = channel.tell_of_configuration()
        {
            log::warn!("the frontend does not hear of the new configuration: {error}");
        }
    }

    /// The protocol features that the frontend took.
    pub(crate) fn agree(&mut self, features: u64) {
        self.agreed = features;
    }

    fn has_agreed(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.agreed & feature.bits() != 0
    }

    /// Whether this message is for [`Session::carry_out`]. What was not negotiated is left to the
    /// `vhost` crate to refuse.
    pub(crate) fn takes(&self, message: Message) -> bool {
        match message.what {
            What::Enable { .. } => self.acked.is_none_or(|acked| acked & PROTOCOL_FEATURES == 0),
            What::Channel => self.has_agreed(VhostUserProtocolFeatures::BACKEND_REQ),
            What::SetStatus(_) | What::GetStatus => {
                self.has_agreed(VhostUserProtocolFeatures::STATUS)
            }
        }
    }

    /// Carries out a message that came beside the `vhost` crate; gives the answer to one that asks
    /// for a number.
    pub(crate) fn carry_out(
        &mut self,
        message: Message,
        fd: Option<OwnedFd>,
    ) -> Result<Option<u64>, SessionError> {
        match (message.what, fd) {
            (What::Enable { index, enable }, None) => self.enable(index, enable)?,
            (What::Channel, Some(fd)) => self.channel = Some(Channel::new(fd)),
            (What::SetStatus(status), None) => {
                if status == 0 {
                    self.reset_rings()?;
                }
                self.status = status & u64::from(u8::MAX);
            }
            (What::GetStatus, None) => {
                let refused = if self.acked.is_some() { 0 } else { FEATURES_OK };
                return Ok(Some(self.status & !refused));
            }
            (_, _) => return Err(SessionError::Descriptors),
        }
        Ok(None)
    }

    pub(crate) fn has_state(&self) -> bool {
        self.device.has_state()
    }

    /// Takes or gives the device's state through this file, once that was answered.
    pub(crate) fn want_transfer(
        &mut self,
        direction: VhostTransferStateDirection,
        file: File,
    ) -> Result<(), SessionError> {
        if !self.has_state() {
            return Err(SessionError::NoState);
        }
        if let Some(queue) = (0..).zip(&self.vrings).find(|(_queue, vring)| vring.running) {
            return Err(SessionError::TransferWhileRunning { queue: queue.0 });
        }
        let flags =
            fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK));
        flags.map_err(|error| SessionError::Transfer(error.into()))?;
        self.transfer = Transfer::Wanted(direction, file);
        Ok(())
    }

    /// Carries a transfer out that was asked for by the frontend at the other end of `socket`; it
    /// fails if that one hangs up.
    pub(crate) fn transfer(&mut self, socket: &UnixStream) {
        if !matches!(self.transfer, Transfer::Wanted(..)) {
            return;
        }
        let Transfer::Wanted(direction, file) = std::mem::take(&mut self.transfer) else { return };
        let moved = match direction {
            VhostTransferStateDirection::SAVE => {
                self.device.save().and_then(|state| Ok(write_all(&file, &state, socket)?))
            }
            VhostTransferStateDirection::LOAD => read_all(&file, socket)
                .map_err(StateError::from)
                .and_then(|state| self.device.load(&state)),
        };
        self.transfer = match moved {
            Ok(()) => Transfer::Done,
            Err(error) => {
                log::warn!("cannot hand over the device's state: {}", chain(&*error));
                Transfer::Failed
            }
        };
    }

    /// Whether the last transfer has moved all of the state.
    pub(crate) fn check_transfer(&self) -> Result<(), SessionError> {
        if matches!(self.transfer, Transfer::Done) { Ok(()) } else { Err(SessionError::NoTransfer) }
    }
}

fn write_all(mut file: &File, mut bytes: &[u8], socket: &UnixStream) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => bytes = &bytes[len..],
            Err(error) => wait(file, PollFlags::OUT, socket, error)?,
        }
    }
    Ok(())
}

fn read_all(mut file: &File, socket: &UnixStream) -> io::Result<Vec<u8>> {
    let (mut all, mut part) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut part) {
            Ok(0) => return Ok(all),
            Ok(len) => all.extend(&part[..len]),
            Err(error) => wait(file, PollFlags::IN, socket, error)?,
        }
        if all.len() as u64 > MOST_STATE_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// After an error that says so, waits until the file is ready, or the frontend hangs up.
fn wait(file: &File, ready: PollFlags, socket: &UnixStream, error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock => {}
        io::ErrorKind::Interrupted => return Ok(()),
        _ => return Err(error),
    }
    let mut fds = [PollFd::new(file, ready), PollFd::new(socket, PollFlags::RDHUP)];
    retry_on_intr(|| poll(&mut fds, None))?;
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    if fds[1].revents().intersects(gone) {
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    Ok(())
}
