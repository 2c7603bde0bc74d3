//! All that the service knows: the sandbox, its containers and their processes. Changed under a lock
//! by whoever carries a request out; pure but for the events that go with a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use containerd_shim_protos::{cgroups_v2::metrics::Metrics, events::task::TaskExit};
use tokio::sync::watch;

use super::{
    error::ServiceError,
    events::{Event, timestamp},
    guest::{Guest, SandboxSettings},
    phase::{Outcome, Phase, Request},
    process::{End, Process},
    publisher::Publisher,
};
use crate::agent::ProcessId;

/// The sandbox.
#[derive(Default)]
pub(super) enum Sandbox {
    /// Nobody asked for it yet, or it could not be started.
    #[default]
    Absent,
    /// By the sandbox service, and not started yet.
    Declared(Box<SandboxSettings>),
    Starting,
    Up(Arc<dyn Guest>),
    /// Its guest is gone, unasked.
    Lost {
        guest: Arc<dyn Guest>,
        reason: String,
    },
    /// It was stopped.
    Gone,
}

/// A container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) init: Process,
    pub(super) execs: BTreeMap<String, Process>,
    pub(super) bundle: PathBuf,
    /// What it used when it was last asked: all that is known after its end.
    pub(super) stats: Option<Metrics>,
    /// containerd was told that it was out of memory.
    pub(super) out_of_memory: bool,
    /// Its init has ended, and its other processes are being ended.
    pub(super) is_ending: bool,
    /// With its end the pod's other containers end.
    pub(super) is_sandbox: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) containers: BTreeMap<String, Container>,
    /// Ids of containers that are being made.
    pub(super) making: BTreeSet<String>,
    pub(super) sandbox: Sandbox,
    /// Whether it was made by the sandbox service, which also says when it ends.
    pub(super) is_declared: bool,
    /// Whether the container that began it was deleted: with the last other one it is over.
    pub(super) sandbox_is_deleted: bool,
    /// When the guest was up.
    pub(super) up_at: Option<SystemTime>,
}

impl Ledger {
    pub(super) fn container(&mut self, id: &str) -> Result<&mut Container, ServiceError> {
        self.containers.get_mut(id).ok_or_else(|| ServiceError::NoContainer(id.to_owned()))
    }

    pub(super) fn process(&mut self, process: &ProcessId) -> Result<&mut Process, ServiceError> {
        let container = self.container(&process.container)?;
        if process.exec.is_empty() {
            return Ok(&mut container.init);
        }
        container.execs.get_mut(&process.exec).ok_or_else(|| ServiceError::NoProcess {
            container: process.container.clone(),
            exec: process.exec.clone(),
        })
    }

    /// The guest, if it is there.
    ///
    /// # Errors
    ///
    /// Fails if it is not, by what became of it.
    pub(super) fn guest(&self, id: &str) -> Result<Arc<dyn Guest>, ServiceError> {
        match &self.sandbox {
            Sandbox::Up(guest) => Ok(Arc::clone(guest)),
            Sandbox::Lost { reason, .. } => Err(ServiceError::SandboxLost(reason.clone())),
            Sandbox::Absent | Sandbox::Declared(_) | Sandbox::Starting | Sandbox::Gone => {
                Err(ServiceError::NoSandbox(id.to_owned()))
            }
        }
    }

    /// Lets `request` be carried out, if the process's phase allows it.
    pub(super) fn admit(
        &mut self,
        process: &ProcessId,
        request: Request,
    ) -> Result<Phase, ServiceError> {
        let process = self.process(process)?;
        let before = process.phase();
        let Some(phase) = before.admit(request) else {
            return Err(match (request, before) {
                (Request::Kill, _) => ServiceError::Finished,
                (_, phase) => ServiceError::Phase { phase, request },
            });
        };
        process.set_phase(phase);
        Ok(before)
    }

    /// Notes a process's end and tells it, unless that was done. What was never started ends in
    /// silence if it is no init.
    pub(super) fn end(&mut self, process: &ProcessId, end: End, publisher: &Publisher) {
        let Ok(found) = self.process(process) else { return };
        if found.ended().is_some() {
            return;
        }
        let was_started = found.phase() != Phase::Created || process.exec.is_empty();
        found.note(Outcome::Ended);
        found.end.send_replace(Some(end));
        // Standard input ends with who reads it.
        if let Some(attachment) = &mut found.attachment {
            attachment.close_input();
        }
        if was_started {
            publisher.push(&Event::Exit(exit(process, found.pid, end)));
        }
    }

    /// Ends all processes of all containers, inits last.
    pub(super) fn end_all(&mut self, end: End, publisher: &Publisher) {
        let processes: Vec<ProcessId> = self
            .containers
            .iter()
            .flat_map(|(id, container)| {
                let execs = container.execs.keys().cloned();
                execs
                    .chain([String::new()])
                    .map(|exec| ProcessId { container: id.clone(), exec })
                    .collect::<Vec<_>>()
            })
            .collect();
        for process in processes {
            self.end(&process, end, publisher);
        }
    }

    /// The containers whose inits have not ended, and where their ends are told.
    pub(super) fn live_inits(&self) -> Vec<(String, watch::Receiver<Option<End>>)> {
        let live = self.containers.iter().filter(|(_, one)| one.init.ended().is_none());
        live.map(|(id, one)| (id.clone(), one.init.end.subscribe())).collect()
    }

    /// Whether nothing is left that containerd could ask for.
    pub(super) fn is_empty(&self) -> bool {
        let sandbox_is_over =
            !self.is_declared || matches!(self.sandbox, Sandbox::Gone | Sandbox::Absent);
        self.containers.is_empty() && self.making.is_empty() && sandbox_is_over
    }
}

fn exit(process: &ProcessId, pid: u32, end: End) -> TaskExit {
    let id = if process.exec.is_empty() { &process.container } else { &process.exec };
    let mut exit = TaskExit::new();
    exit.set_container_id(process.container.clone());
    exit.set_id(id.clone());
    exit.set_pid(pid);
    exit.set_exit_status(end.code);
    exit.set_exited_at(timestamp(end.at));
    exit
}
