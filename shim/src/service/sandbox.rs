//! The sandbox as a thing of its own, without a container that stands for it.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{cgroups_v2::metrics::Metrics, sandbox_api::CreateSandboxRequest};
use tokio::time::timeout;

use super::{
    Service,
    error::ServiceError,
    guest::{Guest, SandboxSettings},
    ledger::Sandbox,
    metrics,
    process::End,
    sandbox_config,
};
use crate::agent::ProcessId;

/// How long containers may take to end by force.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// How the sandbox is.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    pub(super) pid: u32,
    pub(super) is_ready: bool,
    pub(super) up_at: Option<SystemTime>,
    pub(super) end: Option<End>,
    /// For people: what became of it, and what is in it.
    pub(super) words: String,
    pub(super) containers: usize,
}

impl Service {
    /// Refuses requests for sandboxes of others.
    pub(super) fn check_sandbox(&self, id: &str) -> Result<(), ServiceError> {
        if id == self.0.id { Ok(()) } else { Err(ServiceError::OtherSandbox(self.0.id.clone())) }
    }

    /// Notes what the sandbox is to be.
    pub(super) fn declare(&self, request: &CreateSandboxRequest) -> Result<(), ServiceError> {
        self.check_sandbox(&request.sandbox_id)?;
        let mut settings = SandboxSettings {
            id: self.0.id.clone(),
            namespace: self.0.namespace.clone(),
            bundle: PathBuf::from(&request.bundle_path),
            annotations: request.annotations.clone(),
            netns: Some(PathBuf::from(&request.netns_path))
                .filter(|path| !path.as_os_str().is_empty()),
            ..SandboxSettings::default()
        };
        sandbox_config::read(&request.options.value, &mut settings)
            .map_err(|error| ServiceError::Argument(format!("no pod's configuration: {error}")))?;
        let mut ledger = self.ledger();
        if !matches!(ledger.sandbox, Sandbox::Absent) {
            return Err(ServiceError::SandboxExists(self.0.id.clone()));
        }
        ledger.sandbox = Sandbox::Declared(Box::new(settings));
        ledger.is_declared = true;
        Ok(())
    }

    /// Brings its guest up.
    pub(super) async fn start_sandbox(&self) -> Result<Condition, ServiceError> {
        let settings = {
            let mut ledger = self.ledger();
            match std::mem::replace(&mut ledger.sandbox, Sandbox::Starting) {
                Sandbox::Declared(settings) => settings,
                other => {
                    ledger.sandbox = other;
                    return Err(ServiceError::NoSandbox(self.0.id.clone()));
                }
            }
        };
        if let Err(error) = self.launch(settings.as_ref().clone()).await {
            let mut ledger = self.ledger();
            if matches!(ledger.sandbox, Sandbox::Starting) {
                ledger.sandbox = Sandbox::Declared(settings);
            }
            return Err(error);
        }
        Ok(self.condition())
    }

    /// How it is.
    pub(super) fn condition(&self) -> Condition {
        let ledger = self.ledger();
        let words = match &ledger.sandbox {
            Sandbox::Absent => "not there",
            Sandbox::Declared(_) => "not started",
            Sandbox::Starting => "being started",
            Sandbox::Up(_) => "running",
            Sandbox::Lost { reason, .. } => reason,
            Sandbox::Gone => "stopped",
        };
        let guest = ledger.guest(&self.0.id);
        Condition {
            pid: guest.as_ref().map_or_else(|_none| std::process::id(), |guest| guest.host_pid()),
            is_ready: guest.is_ok(),
            up_at: ledger.up_at,
            end: *self.0.sandbox_end.borrow(),
            words: words.to_owned(),
            containers: ledger.containers.len(),
        }
    }

    /// Waits for its end.
    pub(super) async fn wait_sandbox(&self) -> Result<End, ServiceError> {
        let mut end = self.0.sandbox_end.subscribe();
        let ended = end.wait_for(Option::is_some).await.ok().and_then(|end| *end);
        ended.ok_or_else(|| ServiceError::NoSandbox(self.0.id.clone()))
    }

    /// Ends its containers, by force, and its guest. A sandbox that is over stays so.
    pub(super) async fn stop_sandbox(&self, limit: Option<Duration>) -> Result<(), ServiceError> {
        let Ok(guest) = self.guest() else {
            self.note_end(End::now(0));
            self.stop_rest().await;
            return Ok(());
        };
        let mut ends = self.ledger().live_inits();
        for (container, _) in &ends {
            let process = ProcessId { container: container.clone(), exec: String::new() };
            if let Err(error) = guest.signal(&process, libc::SIGKILL, true).await {
                log::debug!("{error}");
            }
        }
        let ended = async {
            for (_, end) in &mut ends {
                if end.wait_for(Option::is_some).await.is_err() {
                    log::debug!("a container is gone");
                }
            }
        };
        if timeout(limit.unwrap_or(KILLED_WITHIN).min(KILLED_WITHIN), ended).await.is_err() {
            log::warn!("not all containers end: their guest does");
        }
        self.note_end(End::now(0));
        self.stop_rest().await;
        Ok(())
    }

    fn guest(&self) -> Result<Arc<dyn Guest>, ServiceError> {
        self.ledger().guest(&self.0.id)
    }

    /// Notes how the sandbox ended, unless that is known.
    pub(super) fn note_end(&self, new: End) {
        self.0.sandbox_end.send_if_modified(|end| {
            let is_new = end.is_none();
            end.get_or_insert(new);
            is_new
        });
    }

    async fn stop_rest(&self) {
        if let Some(guest) = self.give_up("its sandbox is stopped") {
            guest.stop().await;
        }
    }

    /// What all its containers use.
    pub(super) async fn sandbox_stats(&self) -> Metrics {
        let ids: Vec<String> = self.ledger().containers.keys().cloned().collect();
        let mut all = Vec::new();
        for id in ids {
            match self.stats(&id).await {
                Ok(stats) => all.push(stats),
                Err(error) => log::debug!("no figures of `{id}`: {error}"),
            }
        }
        metrics::sum(&all)
    }

    /// Stops it and ends the shim.
    pub(super) async fn shut_sandbox_down(&self) -> Result<(), ServiceError> {
        self.stop_sandbox(None).await?;
        self.quit();
        Ok(())
    }
}
