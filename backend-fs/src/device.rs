//! The device: its configuration, and a worker for each queue.
//!
//! Queue 0 is for what must not wait behind other requests, the rest are request queues (virtio
//! 1.3, section 5.11.2). Each queue has a thread, so that a slow request delays only its own
//! queue. A request is served whole before the next one is taken: what a process leaves in flight
//! when it is killed is one request a queue.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use backend_daemon::device::{Device, DeviceError, QueueIndex, Rings, Sources, Token, Worker};
use backend_daemon::logging::{Limit, chain as error_chain};
use backend_daemon::process::BuildError;

use crate::args::{Args, Tag};
use crate::inheritance::Inheritance;
use crate::sandbox::{SandboxMode, SharedDir};
use crate::share::{Options, Share, raise_file_limit};
use crate::sys;

/// The virtio device id of a file system device (virtio 1.3, section 5.11.1).
const DEVICE_ID: u32 = 26;
const MAX_QUEUE_SIZE: u16 = 1024;

/// How long a worker goes on serving before it lets the guest know and takes orders.
const TURN: Duration = Duration::from_micros(200);

/// A file system device, not in its sandbox yet.
pub struct FsDevice {
    tag: Tag,
    request_queues: u16,
    options: Options,
    mode: SandboxMode,
    /// Until the sandbox is entered.
    shared_dir: Option<SharedDir>,
    guest_fds: u64,
    inheritance: Option<Inheritance>,
    /// From then on.
    share: Arc<OnceLock<Share>>,
}

impl FsDevice {
    /// Opens what the arguments name.
    ///
    /// # Errors
    ///
    /// Fails if the folder can't be opened, too few files may be, or what a predecessor left can't
    /// be read.
    pub fn open(args: &Args) -> Result<Self, BuildError> {
        let missing = |name| BuildError::Usage(format!("{name} is missing"));
        let path = args.shared_dir.as_deref().ok_or_else(|| missing("--shared-dir"))?;
        let tag = args.tag.clone().ok_or_else(|| missing("--tag"))?;
        let shared_dir = SharedDir::open(path).map_err(|source| {
            BuildError::resource(FolderError { path: path.display().to_string(), source })
        })?;
        Ok(Self {
            tag,
            request_queues: args.num_request_queues,
            options: Options::of(args),
            mode: args.sandbox,
            shared_dir: Some(shared_dir),
            guest_fds: raise_file_limit().map_err(BuildError::resource)?,
            inheritance: Some(Inheritance::take(&args.daemon).map_err(BuildError::state)?),
            share: Arc::default(),
        })
    }
}

/// The folder can't be shared.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {path}")]
struct FolderError {
    path: String,
    source: std::io::Error,
}

impl Device for FsDevice {
    type Worker = FsWorker;

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_count(&self) -> u16 {
        1 + self.request_queues
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        // VIRTIO_FS_F_NOTIFICATION would add a queue; nothing notifies yet.
        0
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.bytes().to_vec();
        config.extend(u32::from(self.request_queues).to_le_bytes());
        config
    }

    fn groups(&self) -> Vec<Vec<QueueIndex>> {
        (0..self.queue_count()).map(|queue| vec![QueueIndex(queue)]).collect()
    }

    fn confine(&mut self) -> Result<(), DeviceError> {
        let (Some(shared_dir), Some(inheritance)) =
            (self.shared_dir.take(), self.inheritance.take())
        else {
            return Ok(());
        };
        let place = shared_dir
            .enter(self.mode, self.options.read_only)
            .map_err(|error| failed("enter the sandbox", error))?;
        let share = Share::open(place, self.guest_fds, self.options, inheritance)
            .map_err(|error| failed("open the share", error))?;
        let again = || failed("open the share", "it was opened before");
        self.share.set(share).map_err(|_share| again())
    }

    fn worker(&mut self, _group: usize) -> Result<FsWorker, DeviceError> {
        Ok(FsWorker { share: Arc::clone(&self.share), limit: Limit::default() })
    }
}

fn failed(
    what: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> DeviceError {
    DeviceError::Host { what, source: std::io::Error::other(source) }
}

/// Serves one queue.
pub struct FsWorker {
    share: Arc<OnceLock<Share>>,
    limit: Limit,
}

impl FsWorker {
    fn serve(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let Some(ring) = rings.ring(queue) else { return Ok(()) };
        let share = self.share.get().ok_or_else(|| failed("serve", "the share is not open"))?;
        let turn_ends = Instant::now() + TURN;
        while let Some(chain) = ring.pop()? {
            let (written_bytes, fault) = share.serve(queue.0.into(), &chain);
            if let Some(fault) = fault
                && self.limit.allows()
            {
                log::warn!("queue {}: refused a request: {}", queue.0, error_chain(&fault));
            }
            ring.push(chain, written_bytes)?;
            if Instant::now() >= turn_ends {
                rings.again(queue);
                break;
            }
        }
        Ok(())
    }
}

impl Worker for FsWorker {
    fn negotiated(&mut self, _features: u64) {}

    fn sources(&mut self, _sources: &mut dyn Sources) -> Result<(), DeviceError> {
        // virtiofsd changes the working directory and the umask for the length of a request.
        sys::own_working_directory()
            .map_err(|error| failed("have a working directory of its own", error))
    }

    fn kicked(&mut self, queue: QueueIndex, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        self.serve(queue, rings)
    }

    fn ready(&mut self, _token: Token, _rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn drain(&mut self, _queue: QueueIndex, _rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
}
