//! From the first instruction to a running service, and to the end of the machine.
//!
//! ```text
//! guest:       mounts -> journal -> modules -> control groups -> lo -> seal root -> serve -> power off
//! namespaces:  unshare -> mounts -> control groups -> lo -> serve -> return
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    process::getpid,
    system::{RebootCommand, reboot},
    thread::UnshareFlags,
};

use crate::{
    cgroup::{self, CgroupError},
    journal, modules,
    monotonic::Monotonic,
    mounts::{self, MountError},
    sandbox::network,
    serve::{self, Endpoint, ServeError},
    sys,
    text::chain,
};

/// Why the agent could not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// A file system is missing.
    #[error("can't set the mounts up")]
    Mounts(#[source] MountError),
    /// The control groups are not usable.
    #[error("can't set the control groups up")]
    Cgroups(#[source] CgroupError),
    /// The service failed.
    #[error("can't serve")]
    Serve(#[source] ServeError),
    /// The asynchronous runtime could not be made.
    #[error("can't start the runtime")]
    Runtime(#[source] io::Error),
    /// The machine goes on running.
    #[error("can't power the machine off")]
    PowerOff(#[source] Errno),
    /// Not alone.
    #[error("the agent must be PID 1 of a PID namespace: start it under `unshare --pid --fork`")]
    NotFirst,
    /// No private namespaces.
    #[error("can't enter private namespaces")]
    Namespaces(#[source] io::Error),
}

/// Sets a guest up as its PID 1, serves on vsock, and powers it off.
pub(crate) fn run_guest(began: Monotonic) -> Result<(), InitError> {
    let mounted = mounts::set_up_guest();
    journal::to_kernel();
    mounted.map_err(InitError::Mounts)?;
    log::info!("version {} is PID 1", env!("CARGO_PKG_VERSION"));
    modules::load_listed();
    prepare()?;
    if let Err(error) = mounts::seal_root() {
        log::warn!("{}", chain(&error));
    }
    serve_until_shutdown(&Endpoint::Vsock, began)?;
    log::info!("powering off");
    reboot(RebootCommand::PowerOff).map_err(InitError::PowerOff)
}

/// Serves on the sockets of `folder`, in namespaces cut off from the machine's.
pub(crate) fn run_in_namespaces(folder: &Path, began: Monotonic) -> Result<(), InitError> {
    journal::to_stderr();
    if !getpid().is_init() {
        return Err(InitError::NotFirst);
    }
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWCGROUP;
    sys::unshare(flags).map_err(InitError::Namespaces)?;
    mounts::set_up_namespaces().map_err(InitError::Mounts)?;
    prepare()?;
    serve_until_shutdown(&Endpoint::Unix(PathBuf::from(folder)), began)
}

/// What guest and namespaces have in common.
fn prepare() -> Result<(), InitError> {
    cgroup::set_up().map_err(InitError::Cgroups)?;
    if let Err(error) = network::raise_loopback() {
        log::warn!("can't set lo up: {}", chain(&error));
    }
    // The last one to go when memory runs out: all else depends on it.
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        log::warn!("can't protect the agent from the out-of-memory killer: {error}");
    }
    Ok(())
}

fn serve_until_shutdown(endpoint: &Endpoint, began: Monotonic) -> Result<(), InitError> {
    // One thread carries everything but blocking calls: the agent moves bytes and waits.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .map_err(InitError::Runtime)?;
    let served = runtime.block_on(serve::run(endpoint, began)).map_err(InitError::Serve);
    // Tasks that still wait for processes or hosts have nobody left to answer.
    runtime.shutdown_background();
    served
}
