//! What is asked about processes. Answered at once, from what is known here; also when the guest is lost.

use containerd_shim_protos::{
    api::{ConnectResponse, PidsResponse, ProcessInfo, StateRequest, StateResponse},
    cgroups_v2::metrics::Metrics,
};

use super::{Service, error::ServiceError, events::timestamp, process::End};
use crate::agent::ProcessId;

impl Service {
    /// How a process is.
    pub(super) fn state(&self, request: StateRequest) -> Result<StateResponse, ServiceError> {
        let process = ProcessId { container: request.id, exec: request.exec_id };
        let mut ledger = self.ledger();
        let bundle = ledger.container(&process.container)?.bundle.display().to_string();
        let found = ledger.process(&process)?;
        let mut state = StateResponse::new();
        state.set_bundle(bundle);
        state.set_pid(found.pid);
        state.set_status(found.phase().status());
        state.set_stdin(found.names.stdin.clone());
        state.set_stdout(found.names.stdout.clone());
        state.set_stderr(found.names.stderr.clone());
        state.set_terminal(found.names.terminal);
        if let Some(end) = found.ended() {
            state.set_exit_status(end.code);
            state.set_exited_at(timestamp(end.at));
        }
        state.set_id(process.container);
        state.set_exec_id(process.exec);
        Ok(state)
    }

    /// Waits for the end of a process, however far it is.
    pub(super) async fn wait(&self, process: &ProcessId) -> Result<End, ServiceError> {
        let mut end = self.ledger().process(process)?.end.subscribe();
        let ended = end.wait_for(Option::is_some).await.ok().and_then(|end| *end);
        ended.ok_or_else(|| ServiceError::NoContainer(process.container.clone()))
    }

    /// Host processes that stand for a container; never none.
    pub(super) fn pids(&self, id: &str) -> Result<PidsResponse, ServiceError> {
        let mut ledger = self.ledger();
        let mut info = ProcessInfo::new();
        info.set_pid(ledger.container(id)?.init.pid);
        let mut pids = PidsResponse::new();
        pids.set_processes(vec![info]);
        Ok(pids)
    }

    /// What a container uses, or used at its end.
    pub(super) async fn stats(&self, id: &str) -> Result<Metrics, ServiceError> {
        let (has_ended, known, guest) = {
            let mut ledger = self.ledger();
            let container = ledger.container(id)?;
            let has_ended = container.init.ended().is_some();
            let known = container.stats.clone();
            (has_ended, known, ledger.guest(&self.0.id))
        };
        match guest {
            Ok(guest) if !has_ended => {
                let stats = guest.stats(id).await?;
                if let Ok(container) = self.ledger().container(id)
                    && container.init.ended().is_none()
                {
                    container.stats = Some(stats.clone());
                }
                Ok(stats)
            }
            // Of one that ended before it was ever asked nothing is known.
            _ => Ok(known.unwrap_or_default()),
        }
    }

    /// Who serves, for a containerd that begins anew.
    pub(super) fn connect(&self, id: &str) -> ConnectResponse {
        let mut ledger = self.ledger();
        let task = ledger.container(id).map(|container| container.init.pid);
        let task = task.or_else(|_unknown| ledger.guest(id).map(|guest| guest.host_pid()));
        let mut connected = ConnectResponse::new();
        connected.set_shim_pid(std::process::id());
        connected.set_task_pid(task.unwrap_or_default());
        connected.set_version(env!("CARGO_PKG_VERSION").to_owned());
        connected
    }
}
