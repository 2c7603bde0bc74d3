//! What is asked of processes that run.

use containerd_shim_protos::{
    api::{KillRequest, ResizePtyRequest, UpdateTaskRequest},
    events::task::{TaskPaused, TaskResumed},
};
use oci_spec::runtime::LinuxResources;

use super::{
    Service,
    error::ServiceError,
    events::Event,
    phase::{Outcome, Phase, Request},
};
use crate::agent::ProcessId;

/// The highest signal that Linux has.
const MAX_SIGNAL: u32 = 64;

impl Service {
    /// Sends a signal.
    pub(super) async fn kill(&self, request: KillRequest) -> Result<(), ServiceError> {
        let process = ProcessId { container: request.id, exec: request.exec_id };
        let signal = Some(request.signal).filter(|signal| (1..=MAX_SIGNAL).contains(signal));
        let signal = signal
            .and_then(|signal| i32::try_from(signal).ok())
            .ok_or_else(|| ServiceError::Argument(format!("{} is no signal", request.signal)))?;
        let phase = self.ledger().admit(&process, Request::Kill)?;
        if phase == Phase::Created && !process.exec.is_empty() {
            return Err(ServiceError::NotStarted);
        }
        let guest = self.guest_of(&process)?;
        // "All" is of the container, whichever process is named.
        let all = request.all && process.exec.is_empty();
        Ok(guest.signal(&process, signal, all).await?)
    }

    /// Stops a container's processes where they are.
    pub(super) async fn pause(&self, id: String) -> Result<(), ServiceError> {
        let process = ProcessId { container: id, exec: String::new() };
        let guest = self.guest_of(&process)?;
        self.ledger().admit(&process, Request::Pause)?;
        let paused = guest.pause(&process.container).await;
        let mut ledger = self.ledger();
        let outcome = if paused.is_ok() { Outcome::Paused } else { Outcome::PauseFailed };
        let phase = ledger.process(&process)?.note(outcome);
        if phase == Phase::Paused {
            let mut event = TaskPaused::new();
            event.set_container_id(process.container);
            self.0.publisher.push(&Event::Paused(event));
        }
        Ok(paused?)
    }

    /// Lets them go on.
    pub(super) async fn resume(&self, id: String) -> Result<(), ServiceError> {
        let process = ProcessId { container: id, exec: String::new() };
        let guest = self.guest_of(&process)?;
        self.ledger().admit(&process, Request::Resume)?;
        let resumed = guest.resume(&process.container).await;
        let mut ledger = self.ledger();
        let outcome = if resumed.is_ok() { Outcome::Resumed } else { Outcome::ResumeFailed };
        let phase = ledger.process(&process)?.note(outcome);
        if phase == Phase::Running {
            let mut event = TaskResumed::new();
            event.set_container_id(process.container);
            self.0.publisher.push(&Event::Resumed(event));
        }
        Ok(resumed?)
    }

    /// Changes a container's limits.
    pub(super) async fn update(&self, request: UpdateTaskRequest) -> Result<(), ServiceError> {
        let process = ProcessId { container: request.id, exec: String::new() };
        let guest = self.guest_of(&process)?;
        let resources = request.resources.value.clone();
        if let Err(error) = serde_json::from_slice::<LinuxResources>(&resources) {
            return Err(ServiceError::Argument(format!("no OCI resources: {error}")));
        }
        self.ledger().admit(&process, Request::Update)?;
        Ok(guest.update(&process.container, resources).await?)
    }

    /// Tells a terminal its size, now or when there is one.
    pub(super) async fn resize(&self, request: ResizePtyRequest) -> Result<(), ServiceError> {
        let process = ProcessId { container: request.id, exec: request.exec_id };
        let cells = |count| {
            u16::try_from(count)
                .map_err(|_wide| ServiceError::Argument(format!("{count} is no terminal's size")))
        };
        let size = (cells(request.width)?, cells(request.height)?);
        let phase = {
            let mut ledger = self.ledger();
            let phase = ledger.admit(&process, Request::Resize)?;
            let found = ledger.process(&process)?;
            if !found.names.terminal {
                return Err(ServiceError::Argument("the process has no terminal".to_owned()));
            }
            found.size = Some(size);
            phase
        };
        if phase == Phase::Created {
            return Ok(());
        }
        let guest = self.guest_of(&process)?;
        Ok(guest.resize(&process, size.0, size.1).await?)
    }

    /// Lets standard input end when its other writers go.
    pub(super) fn close_input(&self, process: &ProcessId) -> Result<(), ServiceError> {
        let mut ledger = self.ledger();
        let found = ledger.process(process)?;
        match &mut found.attachment {
            Some(attachment) => attachment.close_input(),
            // Not there before an added process starts.
            None => found.input_is_closed = true,
        }
        Ok(())
    }
}
