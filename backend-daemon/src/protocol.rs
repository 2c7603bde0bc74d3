//! The vhost-user protocol: each message of the frontend becomes one call of the [`Session`].
//!
//! The `vhost` crate reads and checks the messages' form and matches replies to requests.
//! Whatever is refused here ends the connection, not the process.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures,
};

use crate::beside::{self, Message};
use crate::device::Device;
use crate::doorbell::Doorbell;
use crate::fault::{self, Moment};
use crate::logging::chain;
use crate::memory::MAX_REGIONS;
use crate::session::{Session, SessionError};
use crate::vring::Addresses;

/// The session, as the `vhost` crate wants it: behind a lock, which only the protocol's one
/// thread ever takes.
pub(crate) type SharedSession<D> = Arc<Mutex<Session<D>>>;

/// Serves one frontend until it hangs up or breaks the protocol. When `refresh` rings, the device
/// looks again at what it stands for.
///
/// # Errors
///
/// Fails if a worker is gone, and with it the process's reason to live.
pub(crate) fn serve<D: Device>(
    stream: UnixStream,
    session: &SharedSession<D>,
    refresh: &Doorbell,
) -> std::result::Result<(), SessionError> {
    log::debug!("a frontend connected");
    let own = match stream.try_clone() {
        Ok(own) => own,
        Err(error) => {
            log::warn!("dropped the frontend: {error}");
            return Ok(());
        }
    };
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(session));
    loop {
        if wait(&own, refresh) {
            lock(session).refresh();
        }
        // A socket that fails here fails for the handler too, which then says how.
        let message = beside::peek(&own).unwrap_or_default();
        fault::pass(&Moment::MessageCame);
        let message = message.filter(|message| lock(session).takes(*message));
        let done = match message {
            Some(message) => carry_out(message, &own, session),
            None => handler.handle_request(),
        };
        match done {
            Ok(()) | Err(Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => {
                log::debug!("the frontend hung up");
                break;
            }
            Err(error) => {
                log::warn!("dropped the frontend: {}", chain(&error));
                break;
            }
        }
        lock(session).transfer(&own);
        fault::pass(&Moment::MessageHandled);
    }
    drop(handler);
    lock(session).end()
}

/// Waits for a message, or for the bell; gives whether it was the bell.
fn wait(socket: &UnixStream, refresh: &Doorbell) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(refresh, PollFlags::IN)];
    // What goes wrong here goes wrong for the next read too.
    let ready = retry_on_intr(|| poll(&mut fds, None));
    let rang = ready.is_ok() && fds[1].revents().contains(PollFlags::IN);
    if rang {
        refresh.hear();
    }
    rang
}

fn lock<D>(session: &SharedSession<D>) -> MutexGuard<'_, Session<D>> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries out a message that the `vhost` crate does not know.
fn carry_out<D: Device>(
    message: Message,
    own: &UnixStream,
    session: &SharedSession<D>,
) -> Result<()> {
    let fd = message.take(own).map_err(Error::SocketError)?;
    let answered = match lock(session).carry_out(message, fd).map_err(refuse)? {
        Some(value) => message.answer(own, value),
        None => message.acknowledge(own),
    };
    answered.map_err(Error::SocketError)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn refuse(error: SessionError) -> Error {
    Error::ReqHandlerError(io::Error::other(chain(&error)))
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl<D: Device> Session<D> {
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::STATUS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        features.set(VhostUserProtocolFeatures::CONFIG, self.has_config());
        features.set(VhostUserProtocolFeatures::BACKEND_REQ, self.has_config());
        features.set(VhostUserProtocolFeatures::DEVICE_STATE, self.has_state());
        features
    }
}

impl<D: Device> VhostUserBackendReqHandlerMut for Session<D> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; what frontends that still send it mean is: stop.
    fn reset_owner(&mut self) -> Result<()> {
        self.reset_rings().map_err(refuse)
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_rings().map_err(refuse)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.negotiate(features).map_err(refuse)
    }

    fn set_mem_table(&mut self, ctx: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        self.set_memory(ctx, files).map_err(refuse)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.set_size(index, num).map_err(refuse)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let logged_at = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addresses = Addresses { descriptors: descriptor, avail: available, used };
        self.set_addresses(index, addresses, logged_at).map_err(refuse)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.set_base(index, base).map_err(refuse)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.take_base(index).map_err(refuse)?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.set_kick(index.into(), fd).map_err(refuse)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.set_call(index.into(), fd).map_err(refuse)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.set_err(index.into(), fd).map_err(refuse)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let strange = features & !self.protocol_features().bits();
        if strange != 0 {
            return Err(refuse(SessionError::NotOffered(strange)));
        }
        self.agree(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queue_count().into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.enable(index, enable).map_err(refuse)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        Ok(self.config(offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.write_config(offset, buf).map_err(refuse)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported("no device here draws")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("shared objects were not offered")
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        self.make_inflight(inflight).map_err(refuse)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        self.set_inflight(inflight, file).map_err(refuse)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(&mut self, region: &VhostUserSingleMemoryRegion, fd: File) -> Result<()> {
        self.add_memory(region, fd).map_err(refuse)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.remove_memory(region).map_err(refuse)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        let VhostTransferStatePhase::STOPPED = phase;
        self.want_transfer(direction, fd).map_err(refuse)?;
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.check_transfer().map_err(refuse)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("shared memory was not offered")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.set_dirty_log(log, file).map_err(refuse)
    }
}
