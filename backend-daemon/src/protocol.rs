//! The vhost-user protocol: each message of the frontend becomes one call of the [`Session`].
//!
//! The `vhost` crate reads and checks the messages' form and matches replies to requests.
//! Whatever is refused here ends the connection, not the process.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use crate::device::Device;
use crate::early;
use crate::fault::{self, Moment};
use crate::logging::chain;
use crate::memory::MAX_REGIONS;
use crate::session::{Session, SessionError};
use crate::vring::Addresses;

/// The session, as the `vhost` crate wants it: behind a lock, which only the protocol's one
/// thread ever takes.
pub(crate) type SharedSession<D> = Arc<Mutex<Session<D>>>;

/// Serves one frontend until it hangs up or breaks the protocol.
///
/// # Errors
///
/// Fails if a worker is gone, and with it the process's reason to live.
pub(crate) fn serve<D: Device>(
    stream: UnixStream,
    session: &SharedSession<D>,
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
        // A socket that fails here fails for the handler too, which then says how.
        let early = early::peek(&own).unwrap_or_default();
        fault::pass(&Moment::MessageCame);
        match handler.handle_request() {
            Ok(()) | Err(Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => {
                log::debug!("the frontend hung up");
                break;
            }
            Err(Error::InactiveFeature(VhostUserVirtioFeatures::PROTOCOL_FEATURES))
                if let Some(state) = early =>
            {
                let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
                let done = session.enable(state.index, state.enable).map_err(refuse);
                if let Err(error) =
                    done.and_then(|()| state.answer(&own).map_err(Error::SocketError))
                {
                    log::warn!("dropped the frontend: {}", chain(&error));
                    break;
                }
            }
            Err(error) => {
                log::warn!("dropped the frontend: {}", chain(&error));
                break;
            }
        }
        fault::pass(&Moment::MessageHandled);
    }
    drop(handler);
    session.lock().unwrap_or_else(PoisonError::into_inner).end()
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
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        features.set(VhostUserProtocolFeatures::CONFIG, self.has_config());
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
        _log: u64,
    ) -> Result<()> {
        if !flags.is_empty() {
            return unsupported("logging of a ring was not offered");
        }
        let addresses = Addresses { descriptors: descriptor, avail: available, used };
        self.set_addresses(index, addresses).map_err(refuse)
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
        if strange == 0 { Ok(()) } else { Err(refuse(SessionError::NotOffered(strange))) }
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
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported("device state was not offered")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("device state was not offered")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("shared memory was not offered")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("logging was not offered")
    }
}
