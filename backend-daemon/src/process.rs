//! The process half: from a command line to a jailed process that serves one device.
//!
//! Nothing here knows virtqueues or vhost-user messages.

mod args;

use std::error::Error;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::process::ExitCode;

use nacre_proto::exit::BackendExit;

pub use self::args::DaemonArgs;
use crate::device::Device;
use crate::sys;

/// What one kind of backend may do, and says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The device's type in `--print-capabilities`: "block", "net", "fs" or "vsock".
    pub device_type: &'static str,
    /// The feature names in `--print-capabilities`, from QEMU's `docs/interop/vhost-user.json`.
    pub features: &'static [&'static str],
    /// System calls that the workers need besides the daemon's own allow-list, by number
    /// (`libc::SYS_…`).
    pub worker_syscalls: &'static [i64],
    /// Capabilities that stay permitted and effective; all others are dropped for good.
    pub keep_capabilities: &'static [caps::Capability],
}

/// Why a device could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The arguments contradict each other or make no sense: [`BackendExit::Usage`].
    #[error("{0}")]
    Usage(String),
    /// What the device stands for can't be had: [`BackendExit::Resource`].
    #[error(transparent)]
    Resource(Box<dyn Error + Send + Sync>),
}

impl BuildError {
    /// An error about what the device stands for, with its sources.
    pub fn resource(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Resource(Box::new(error))
    }

    /// How the process ends for it.
    #[must_use]
    pub fn exit(&self) -> BackendExit {
        match self {
            Self::Usage(_) => BackendExit::Usage,
            Self::Resource(_) => BackendExit::Resource,
        }
    }
}

/// Takes ownership of a descriptor that this process inherited under a number it was told, and
/// sets it close-on-exec. For arguments such as `--disk-fd`; ask for each number once.
///
/// # Errors
///
/// Fails if there is no such descriptor, or it is one of the three standard ones.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    sys::inherited_fd(number)
}

/// Runs a backend: opens its socket, builds the device, closes the jail, serves frontends.
///
/// `build` opens everything that the device will ever need. It runs with the process's original
/// rights and must not start threads: they would live outside the jail.
pub fn run<D: Device>(
    name: &'static str,
    args: &DaemonArgs,
    policy: &Policy,
    build: impl FnOnce() -> Result<D, BuildError>,
) -> ExitCode {
    log::debug!("{name}: {args:?} {policy:?}");
    let exit = match build() {
        Ok(device) => {
            log::error!("device {} is not served yet", device.device_id());
            BackendExit::Failed
        }
        Err(error) => error.exit(),
    };
    ExitCode::from(u8::from(exit))
}
