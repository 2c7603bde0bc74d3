//! Ending a sandbox from outside its supervisor.
//!
//! The supervisor's control socket has no part in it: the container is signalled through the agent,
//! which takes any number of connections, and the supervisor itself by signals to the very process
//! that the record names. So a supervisor that hangs can still be ended.

use std::{os::fd::OwnedFd, time::Duration};

use rustix::process::{Signal, pidfd_send_signal};
use tokio::{io::unix::AsyncFd, time::timeout};

use crate::{
    agent::{Agent, ProcessId},
    name::SandboxName,
    registry::{Life, Registry, RegistryError},
    sys,
};

/// How long the agent may take to be told.
const TELL_WITHIN: Duration = Duration::from_secs(10);
/// How long a supervisor may take to end its sandbox after each further step.
const STEP: Duration = Duration::from_secs(15);

/// Why a sandbox could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// There is no such sandbox, or its state is unclear.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Its supervisor can't be watched or signalled.
    #[error("sandbox `{name}`: its supervisor can't be ended")]
    Supervisor {
        /// Which.
        name: SandboxName,
        /// Why not.
        source: std::io::Error,
    },
    /// Even SIGKILL did not help.
    #[error("sandbox `{0}`: its supervisor does not end")]
    Stuck(SandboxName),
}

/// Asks the container to end, waits for `grace`, and ends it by force. One that does not run is
/// left as it is.
///
/// # Errors
///
/// Fails if there is no such sandbox or its supervisor can't be ended.
pub async fn stop(
    registry: &Registry,
    name: &SandboxName,
    grace: Duration,
) -> Result<(), StopError> {
    let (record, files) = registry.find(name)?;
    if !matches!(Life::of(&record), Life::Creating | Life::Running) {
        return Ok(());
    }
    let Some(pidfd) = record.supervisor.open() else { return Ok(()) };
    let failed = |source| StopError::Supervisor { name: name.clone(), source };
    let supervisor = sys::watch_readable(pidfd).map_err(failed)?;
    let process = ProcessId { container: name.to_string(), exec: String::new() };
    let agent =
        timeout(TELL_WITHIN, Agent::connect(&files.vsock(), TELL_WITHIN, TELL_WITHIN)).await;
    if let Ok(Ok(agent)) = agent {
        for (signal, patience) in [(libc::SIGTERM, grace), (libc::SIGKILL, STEP)] {
            let all = signal == libc::SIGKILL;
            if let Err(error) = agent.signal(&process, signal, all).await {
                log::debug!("{error}");
            }
            if ended_within(&supervisor, patience).await {
                return Ok(());
            }
        }
    }
    log::warn!("sandbox `{name}` does not end through its agent: its supervisor is told");
    for signal in [Signal::TERM, Signal::TERM, Signal::TERM, Signal::KILL] {
        pidfd_send_signal(&supervisor, signal).map_err(|error| failed(error.into()))?;
        let patience = if signal == Signal::KILL { STEP } else { Duration::from_secs(3) };
        if ended_within(&supervisor, patience).await {
            return Ok(());
        }
    }
    Err(StopError::Stuck(name.clone()))
}

async fn ended_within(supervisor: &AsyncFd<OwnedFd>, limit: Duration) -> bool {
    timeout(limit, supervisor.readable()).await.is_ok_and(|readable| readable.is_ok())
}

/// Removes a sandbox; with `force`, one that runs is ended first.
///
/// # Errors
///
/// Fails if there is no such sandbox, or it runs and `force` is not given.
pub async fn remove(registry: &Registry, name: &SandboxName, force: bool) -> Result<(), StopError> {
    if force {
        match stop(registry, name, Duration::ZERO).await {
            // A supervisor in the foreground takes its folder with it.
            Err(StopError::Registry(RegistryError::Record(error))) => log::debug!("{error}"),
            stopped => stopped?,
        }
    }
    match registry.remove(name) {
        Err(RegistryError::Unknown(_)) if force => Ok(()),
        removed => Ok(removed?),
    }
}
