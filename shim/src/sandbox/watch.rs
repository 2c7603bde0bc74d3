//! Every wait of a sandbox is also a wait for the death of one of its processes, which is reported
//! as what it is: the VMM's, a backend's, or one because of the other.

use std::time::Duration;

use nacre_proto::exit::VmmExit;
use tokio::time::timeout;

use crate::{
    agent::AgentError,
    backends::{BackendError, Happening},
    child::{ChildError, End},
    log_file,
    sandbox::{SandboxError, create::VmUp},
    vmm,
};

/// How long to wait for the death that explains another one.
const EXPLANATION: Duration = Duration::from_secs(2);
/// How long what the guest's kernel printed last may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How many lines of the guest's console an error carries.
const CONSOLE_LINES: usize = 12;
/// How Linux begins the line that names a panic (kernel/panic.c).
const PANIC: &str = "Kernel panic - ";

impl VmUp {
    /// Keeps the devices served, and resolves when a process that the sandbox can't do without has
    /// ended, with the reason.
    pub(super) async fn death(&mut self) -> SandboxError {
        loop {
            let happening = tokio::select! {
                end = self.vmm.child().ended() => match end {
                    Ok(end) => return self.vmm_ended(end).await,
                    Err(error) => return BackendError::Child(ChildError::Watch {
                        name: "nacre-vmm".to_owned(),
                        source: error,
                    }).into(),
                },
                happening = self.devices.next() => happening,
            };
            match happening {
                Happening::GivenUp(error) => return self.backend_ended(error).await,
                // Only what cleans up after a killed supervisor reads it.
                Happening::Replaced => {
                    if let Err(error) = self.record_children() {
                        log::warn!("{error}");
                    }
                }
            }
        }
    }

    async fn vmm_ended(&mut self, end: End) -> SandboxError {
        if matches!(vmm::meaning(end), Some(VmmExit::Backend | VmmExit::Failed)) {
            let devices = timeout(EXPLANATION, self.devices.given_up()).await;
            if let Ok(error) = devices
                && error.end().is_some_and(|end| end != End::Code(0))
            {
                return error.into();
            }
        }
        self.vmm_end(end).await
    }

    async fn vmm_end(&self, end: End) -> SandboxError {
        self.vmm.console_ended(LAST_WORDS).await;
        SandboxError::VmmEnded {
            end,
            last_words: self.vmm.child().last_words(),
            panic: log_file::last_after(&self.base.files.console(), PANIC),
            console: self.console_tail(),
        }
    }

    async fn backend_ended(&self, error: BackendError) -> SandboxError {
        // A backend whose connection is over ends in order: then it was the VMM that went first.
        if error.end() == Some(End::Code(0))
            && let Some(end) = self.vmm.child().ended_within(EXPLANATION).await
        {
            return self.vmm_end(end).await;
        }
        error.into()
    }

    pub(super) fn console_tail(&self) -> Option<String> {
        log_file::tail(&self.base.files.console(), CONSOLE_LINES)
    }

    /// Waits for `work` and for the death of a process; a death explains a broken connection.
    pub(super) async fn guarded<T, E: Into<SandboxError>>(
        &mut self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, SandboxError> {
        let error = tokio::select! {
            biased;
            result = work => match result {
                Ok(value) => return Ok(value),
                Err(error) => error.into(),
            },
            death = self.death() => return Err(death),
        };
        let broken = matches!(
            error,
            SandboxError::Agent(
                AgentError::Lost { .. } | AgentError::Unreachable(_) | AgentError::Mute
            ) | SandboxError::Stream(_)
        );
        if broken && let Ok(death) = timeout(EXPLANATION, self.death()).await {
            return Err(death);
        }
        Err(error)
    }
}
