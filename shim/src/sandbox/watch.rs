//! Every wait of a sandbox is also a wait for the death of one of its processes, which is reported
//! as what it is: the VMM's, a backend's, or one because of the other.

use std::time::Duration;

use nacre_proto::exit::VmmExit;
use rustix::process::Pid;
use tokio::time::timeout;
use vfio::Opened;

use crate::{
    agent::AgentError,
    backends::{BackendError, Happening},
    child::{ChildError, End},
    log_file,
    passthrough::{Function, memlock},
    sandbox::{SandboxError, change::Errand, create::VmUp},
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
                biased;
                end = self.vmm.child().ended() => match end {
                    Ok(end) => return self.vmm_ended(end).await,
                    Err(error) => return BackendError::Child(ChildError::Watch {
                        name: "nacre-vmm".to_owned(),
                        source: error,
                    }).into(),
                },
                happening = self.devices.next() => happening,
                // Last: what happened before it is seen to first.
                Some(errand) = self.errands.1.recv() => {
                    self.run(errand);
                    continue;
                }
            };
            match happening {
                Happening::GivenUp(error) => return self.backend_ended(error).await,
                Happening::Gone(device) => {
                    log::info!("`{device}` is gone");
                    self.host.end_network(&device);
                    self.write_children();
                }
                Happening::Replaced => self.write_children(),
            }
        }
    }

    /// Does what a change of the sandbox needs done.
    fn run(&mut self, errand: Errand) {
        match errand {
            Errand::Keep(backend) => {
                self.devices.keep(*backend, &self.vmm.link());
                self.write_children();
            }
            Errand::MakeNetwork(device, answer) => {
                if answer.send(self.host.make_network(&device)).is_err() {
                    self.host.end_network(&device);
                }
            }
            Errand::EndNetwork(device) => self.host.end_network(&device),
            Errand::OpenDevice(function, answer) => {
                if answer.send(self.open_device(&function)).is_err() {
                    self.host.give_back_device(function.address);
                }
            }
            Errand::GiveBack(address) => self.host.give_back_device(address),
            Errand::Record(now) => {
                let Some(registration) = &mut self.host.registration else { return };
                let written = registration.update(|record| {
                    (record.cpus, record.memory_bytes) = (now.cpus, now.memory_bytes);
                });
                if let Err(error) = written {
                    log::warn!("{error}");
                }
            }
            Errand::Settle(answer) => {
                if answer.send(()).is_err() {
                    log::debug!("nobody waits for what was seen to");
                }
            }
        }
    }

    /// Opens a device of the host's, and lets the VMM lock what as many as there may be need.
    fn open_device(&mut self, function: &Function) -> Result<Opened, SandboxError> {
        let needed = memlock::needed(self.base.plan.max_memory, memlock::MOST_DEVICES);
        if let Some(vmm) = Pid::from_raw(self.vmm.child().record().pid) {
            memlock::raise(vmm, needed)?;
        }
        self.host.open_device(function)
    }

    /// Only what cleans up after a killed supervisor reads it.
    fn write_children(&mut self) {
        if let Err(error) = self.record_children() {
            log::warn!("{error}");
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

    async fn vmm_end(&mut self, end: End) -> SandboxError {
        self.vmm.console_ended(LAST_WORDS).await;
        SandboxError::VmmEnded {
            end,
            last_words: self.vmm.child().last_words(),
            panic: log_file::last_after(&self.base.files.console(), PANIC),
            console: self.console_tail(),
        }
    }

    async fn backend_ended(&mut self, error: BackendError) -> SandboxError {
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
