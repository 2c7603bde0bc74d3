//! Forgetting processes that have ended, and containers with them.

use std::time::Duration;

use containerd_shim_protos::events::task::TaskDelete;
use tokio::time::timeout;

use super::{
    Service,
    error::ServiceError,
    events::{Event, timestamp},
    exit::drained_within,
    ledger::Sandbox,
    mounts,
    phase::{Phase, Request},
    process::End,
};
use crate::agent::ProcessId;

/// How long a container that was never started may take to end.
const KILLED_WITHIN: Duration = Duration::from_secs(10);
/// How long the rest of the output may take before it is given up.
const DRAINED_WITHIN: Duration = Duration::from_secs(10);

/// What is told of a deleted process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deleted {
    pub(super) pid: u32,
    pub(super) end: End,
}

impl Service {
    /// Forgets a process that has ended or was never started; with an init its container.
    pub(super) async fn delete(&self, process: ProcessId) -> Result<Deleted, ServiceError> {
        let before = self.ledger().admit(&process, Request::Delete)?;
        let is_init = process.exec.is_empty();
        if is_init && before == Phase::Created {
            self.end_unstarted(&process).await;
        }
        if before != Phase::Created {
            let drained = self.ledger().process(&process)?.drained.subscribe();
            drained_within(drained, DRAINED_WITHIN).await;
        }
        // An added process that was never started is unknown to the guest.
        if (is_init || before != Phase::Created)
            && let Ok(guest) = self.guest_of(&process)
            && let Err(error) = guest.delete(&process).await
        {
            log::debug!("the guest forgets nothing: {error}");
        }
        let deleted = if is_init {
            self.remove_container(&process).await?
        } else {
            self.remove_exec(&process)?
        };
        Ok(deleted)
    }

    /// Ends an init that waits for its start.
    async fn end_unstarted(&self, process: &ProcessId) {
        let Ok(guest) = self.guest_of(process) else { return };
        let Ok(mut end) = self.ledger().process(process).map(|found| found.end.subscribe()) else {
            return;
        };
        if let Err(error) = guest.signal(process, libc::SIGKILL, true).await {
            log::debug!("{error}");
        }
        if timeout(KILLED_WITHIN, end.wait_for(Option::is_some)).await.is_err() {
            log::warn!("container `{}` does not end", process.container);
        }
        self.ledger().end(process, End::killed(), &self.0.publisher);
    }

    fn remove_exec(&self, process: &ProcessId) -> Result<Deleted, ServiceError> {
        let mut ledger = self.ledger();
        let found = ledger.process(process)?;
        let end = found.ended().unwrap_or_else(|| End::now(0));
        let deleted = Deleted { pid: found.pid, end };
        found.end.send_replace(Some(end));
        ledger.container(&process.container)?.execs.remove(&process.exec);
        Ok(deleted)
    }

    async fn remove_container(&self, process: &ProcessId) -> Result<Deleted, ServiceError> {
        let rootfs = self.ledger().container(&process.container)?.bundle.join("rootfs");
        tokio::task::spawn_blocking(move || mounts::unmount_all(&rootfs)).await?;
        let (deleted, guest) = {
            let mut ledger = self.ledger();
            let container = ledger.container(&process.container)?;
            let is_sandbox = container.is_sandbox;
            let end = container.init.ended().unwrap_or_else(End::killed);
            let deleted = Deleted { pid: container.init.pid, end };
            let mut event = TaskDelete::new();
            event.set_container_id(process.container.clone());
            event.set_pid(deleted.pid);
            event.set_exit_status(end.code);
            event.set_exited_at(timestamp(end.at));
            ledger.containers.remove(&process.container);
            self.0.publisher.push(&Event::Delete(event));
            ledger.sandbox_is_deleted |= is_sandbox;
            let is_over = ledger.sandbox_is_deleted && ledger.is_empty();
            (deleted, is_over.then(|| ledger.take_guest()).flatten())
        };
        if let Some(guest) = guest {
            guest.stop().await;
        }
        Ok(deleted)
    }

    /// Ends the shim if nothing is left, or at once.
    pub(super) fn shut_down(&self, now: bool) {
        if now || self.ledger().is_empty() {
            self.quit();
        } else {
            log::debug!("the shim stays: there are containers");
        }
    }
}

impl super::ledger::Ledger {
    /// Takes the guest, which nobody is to use any more.
    pub(super) fn take_guest(&mut self) -> Option<std::sync::Arc<dyn super::guest::Guest>> {
        match std::mem::replace(&mut self.sandbox, Sandbox::Gone) {
            Sandbox::Up(guest) | Sandbox::Lost { guest, .. } => Some(guest),
            Sandbox::Absent | Sandbox::Declared(_) | Sandbox::Starting | Sandbox::Gone => None,
        }
    }
}
