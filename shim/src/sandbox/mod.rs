//! The life of a sandbox, as a chain of types that consume each other:
//!
//! ```text
//!  Planned -- claim -------------> Claimed      the name, its folder, network and cgroup
//!          -- spawn_backends ----> BackendsUp   one process a device, side by side, all ready
//!          -- start_vmm ---------> VmUp         the guest boots
//!          -- connect_agent -----> AgentUp      the agent answers, the guest is configured
//!          -- start_container ---> Running      the program runs, its streams move
//!          -- supervise ---------> Ended        exit code; everything is gone
//! ```
//!
//! Each value owns what its step made and, behind it, the value before. So dropping any of them, on
//! an error or because its future was dropped on a signal, takes down in reverse what exists: the
//! VMM, the backends, network and cgroup, the folder. From the VMM's start on, every wait is also
//! a wait for the death of a process, and a death is reported as what it is.

mod change;
mod connect;
mod container;
mod control;
mod create;
mod error;
mod functions;
mod held;
mod host;
mod run;
mod shutdown;
mod signals;
mod stop;
mod watch;

use std::{path::PathBuf, time::Duration};

use tokio::sync::{mpsc, oneshot};

pub use create::{AgentUp, BackendsUp, Claimed, Planned, VmUp};
pub use error::SandboxError;
pub(crate) use held::{Held, Ways};
pub use host::HostResources;
pub use run::Running;
pub use stop::{StopError, remove, stop};

use crate::{registry::Registry, streams::Ends, timing::Timeline};

/// How a sandbox is to be made and watched, beside what it is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the other programs are.
    pub programs: PathBuf,
    /// Where the sandbox is registered.
    pub registry: Registry,
    /// How much the processes are to log.
    pub log_level: log::LevelFilter,
    /// How long the guest may boot without a sign of progress, and a call to the agent take.
    pub agent_timeout: Duration,
    /// Whether the folder stays, with record and logs, once the container has run.
    pub keep: bool,
    /// Whether to look at the VMM's own figures once the container runs.
    pub measure: bool,
}

/// What a supervisor is asked while it supervises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Pass this signal to the container's init, or, if it has been patient enough, end all.
    Signal(i32),
    /// The local terminal has a new size.
    Resize {
        /// In characters.
        columns: u16,
        /// In characters.
        rows: u16,
    },
}

/// A sandbox that came to its end in order.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The exit code for `nacre run`.
    pub code: u8,
    /// When what happened.
    pub timeline: Timeline,
}

/// Makes the sandbox, runs its container to its end, and takes everything down.
///
/// `started` is told once the container's program runs. If `requests` closes, nothing changes.
///
/// # Errors
///
/// Fails if a step does; nothing is left then.
pub async fn run(
    claimed: Claimed,
    ends: Ends,
    mut requests: mpsc::Receiver<Request>,
    started: Option<oneshot::Sender<()>>,
) -> Result<(Ended, HostResources), SandboxError> {
    let mut size = None;
    let running = {
        let create = async {
            let backends = claimed.spawn_backends().await?;
            let vm = backends.start_vmm()?;
            let agent = vm.connect_agent().await?;
            agent.start_container(ends).await
        };
        tokio::pin!(create);
        loop {
            tokio::select! {
                running = &mut create => break running?,
                Some(request) = requests.recv() => match request {
                    Request::Signal(signal) => return Err(SandboxError::Interrupted(signal)),
                    Request::Resize { columns, rows } => size = Some((columns, rows)),
                },
            }
        }
    };
    if let Some((columns, rows)) = size {
        running.resize(columns, rows);
    }
    if let Some(started) = started
        && started.send(()).is_err()
    {
        log::debug!("nobody waits for the start");
    }
    running.supervise(requests).await
}
