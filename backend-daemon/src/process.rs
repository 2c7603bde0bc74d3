//! The process half: from a command line to a jailed process that serves one device.
//!
//! Nothing here knows virtqueues or vhost-user messages.

mod args;
mod estate;
mod jail;
mod seccomp;
mod signals;
mod socket;
mod threads;

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::panic::{self, PanicHookInfo};
use std::process::ExitCode;

use nacre_proto::exit::BackendExit;

pub use self::args::DaemonArgs;
pub use self::estate::{Estate, EstateError, State, Store};
use self::jail::{Jail, JailError};
use self::seccomp::Removal;
use self::signals::Signals;
use self::socket::{Socket, SocketError};
use self::threads::{Threads, ThreadsError};
use crate::device::{Device, DeviceError};
use crate::{fault, logging, sys};

/// What one kind of backend may do, and says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The device's type in `--print-capabilities`: "block", "net", "fs" or "vsock".
    pub device_type: &'static str,
    /// The feature names in `--print-capabilities`, from QEMU's `docs/interop/vhost-user.json`.
    pub features: &'static [&'static str],
    /// System calls that the workers need besides the daemon's own allow-list, by number
    /// (`libc::SYS_...`).
    pub worker_syscalls: &'static [i64],
    /// The requests that workers make by `ioctl`.
    pub worker_ioctls: &'static [u64],
    /// Capabilities that stay permitted and effective; all others are dropped for good.
    pub keep_capabilities: &'static [caps::Capability],
    /// The program removes files that it has made, after [`run`] and on the same thread.
    pub removes_files: bool,
    /// [`Device::confine`] gives the process another root directory, and its workers open files
    /// there. No folder outside stays open then: the socket's path is left for a successor, which
    /// takes it over.
    pub leaves_root: bool,
    /// SIGHUP does not end the process, but has [`Device::refresh`] called.
    pub refreshes: bool,
}

impl Policy {
    /// That of a device that needs nothing beside what the daemon itself needs.
    #[must_use]
    pub const fn of(device_type: &'static str) -> Self {
        Self {
            device_type,
            features: &[],
            worker_syscalls: &[],
            worker_ioctls: &[],
            keep_capabilities: &[],
            removes_files: false,
            leaves_root: false,
            refreshes: false,
        }
    }
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
    /// What a predecessor left can't be read: [`BackendExit::State`].
    #[error(transparent)]
    State(Box<dyn Error + Send + Sync>),
}

impl BuildError {
    /// An error about what the device stands for, with its sources.
    pub fn resource(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Resource(Box::new(error))
    }

    /// An error about what a predecessor left, with its sources.
    pub fn state(error: impl Error + Send + Sync + 'static) -> Self {
        Self::State(Box::new(error))
    }

    /// How the process ends for it.
    #[must_use]
    pub fn exit(&self) -> BackendExit {
        match self {
            Self::Usage(_) => BackendExit::Usage,
            Self::Resource(_) => BackendExit::Resource,
            Self::State(_) => BackendExit::State,
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

/// Why a backend did not get as far as serving, or stopped.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("cannot serve")]
    Socket(#[from] SocketError),
    #[error("cannot take signals")]
    Signals(#[source] io::Error),
    #[error("cannot close the jail")]
    Jail(#[from] JailError),
    #[error("cannot confine the device")]
    Confine(#[source] DeviceError),
    #[error("cannot start")]
    Threads(#[from] ThreadsError),
    #[error("cannot say that the device is ready")]
    Ready(#[source] io::Error),
    #[error("cannot print the capabilities")]
    Print(#[source] io::Error),
}

impl RunError {
    fn exit(&self) -> BackendExit {
        match self {
            Self::Build(error) => error.exit(),
            Self::Socket(SocketError::Missing) => BackendExit::Usage,
            Self::Socket(_) => BackendExit::Resource,
            Self::Jail(_) | Self::Confine(_) | Self::Threads(ThreadsError::Jail(_)) => {
                BackendExit::Jail
            }
            Self::Signals(_) | Self::Threads(_) | Self::Ready(_) | Self::Print(_) => {
                BackendExit::Failed
            }
        }
    }
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
    logging::start(name, args.log_level);
    fault::arm();
    let exit = if args.print_capabilities {
        print_capabilities(policy).map(|()| BackendExit::Done)
    } else {
        serve(args, policy, build)
    };
    let exit = exit.unwrap_or_else(|error| {
        logging::say(&format!("{name}: {}", logging::chain(&error)));
        error.exit()
    });
    ExitCode::from(u8::from(exit))
}

fn serve<D: Device>(
    args: &DaemonArgs,
    policy: &Policy,
    build: impl FnOnce() -> Result<D, BuildError>,
) -> Result<BackendExit, RunError> {
    panic::set_hook(Box::new(log_panic));
    let signals = Signals::take(policy.refreshes).map_err(RunError::Signals)?;
    let ready = args.ready_fd.map(inherited_fd).transpose().map_err(RunError::Ready)?;
    // The device first: a frontend must not find a socket that nobody will serve.
    let mut device = build()?;
    let workers = Threads::workers(&mut device)?;
    let (socket, mut path) = Socket::open(args)?;
    let served = device.confine().map_err(RunError::Confine).and_then(|()| {
        path.take_if(|_path| policy.leaves_root);
        let removal = match &path {
            _ if policy.removes_files => Removal::Anything,
            Some(path) => Removal::InFolder(path.folder()),
            None => Removal::Nothing,
        };
        jail::close_process(policy.keep_capabilities)?;
        let mut threads = Threads::new(Jail::new(policy, removal)?)?;
        threads.start(device, workers, socket)?;
        if let Some(ready) = ready {
            // Who connects from now on is served, if not at once.
            File::from(ready).write_all(b"ready\n").map_err(RunError::Ready)?;
        }
        threads.serve()?;
        Ok(threads.wait(&signals))
    });
    if let Some(path) = path {
        path.remove();
    }
    served
}

/// The standard hook would look for symbols in files that the jail does not let it open.
fn log_panic(info: &PanicHookInfo<'_>) {
    log::error!("{info}");
}

/// `docs/interop/vhost-user.json` of QEMU: a type, and the features that the program knows.
fn print_capabilities(policy: &Policy) -> Result<(), RunError> {
    let capabilities = serde_json::json!({
        "type": policy.device_type,
        "features": policy.features,
    });
    writeln!(io::stdout(), "{capabilities}").map_err(RunError::Print)
}
