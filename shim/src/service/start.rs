//! Starting inits, and adding and starting other processes.

use std::sync::Arc;

use containerd_shim_protos::{
    api::ExecProcessRequest,
    events::task::{TaskExecAdded, TaskExecStarted, TaskStart},
};

use super::{
    Service, bundle,
    error::ServiceError,
    events::Event,
    guest::{Guest, NewProcess},
    phase::{Outcome, Request},
    process::{End, Process},
    stdio::{self, Attachment, Names, Owner},
};
use crate::{agent::ProcessId, streams::Streams};

/// What is told of an init that could not be started.
const NOT_STARTED: u32 = 255;

impl Service {
    /// Starts a process; answers a host process that stands for it.
    pub(super) async fn start(&self, process: ProcessId) -> Result<u32, ServiceError> {
        if process.exec.is_empty() {
            self.start_init(&process).await
        } else {
            self.start_exec(&process).await
        }
    }

    async fn start_init(&self, process: &ProcessId) -> Result<u32, ServiceError> {
        let (guest, size) = {
            let mut ledger = self.ledger();
            ledger.process(process)?;
            let guest = ledger.guest(&self.0.id)?;
            ledger.admit(process, Request::Start)?;
            (guest, ledger.process(process)?.size)
        };
        give_size(guest.as_ref(), process, size).await;
        let started = match self.begin_input(process) {
            Ok(()) => guest.start(process).await.map_err(ServiceError::from),
            Err(error) => Err(error),
        };
        let mut ledger = self.ledger();
        if let Err(error) = started {
            ledger.end(process, End::now(NOT_STARTED), &self.0.publisher);
            // It printed nothing.
            ledger.process(process)?.drained.send_replace(true);
            return Err(error);
        }
        self.started(&mut ledger, process)
    }

    async fn start_exec(&self, process: &ProcessId) -> Result<u32, ServiceError> {
        let init = ProcessId { container: process.container.clone(), exec: String::new() };
        let (guest, new) = {
            let mut ledger = self.ledger();
            ledger.process(process)?;
            let guest = ledger.guest(&self.0.id)?;
            ledger.admit(&init, Request::StartExec)?;
            let is_ending = ledger.container(&init.container)?.is_ending;
            if is_ending {
                return Err(ServiceError::Phase {
                    phase: super::phase::Phase::Stopped,
                    request: Request::StartExec,
                });
            }
            ledger.admit(process, Request::Start)?;
            let found = ledger.process(process)?;
            let new = found.new.take().ok_or(ServiceError::NotStarted)?;
            (guest, new)
        };
        let run = self.run_exec(guest.as_ref(), process, new).await;
        let mut ledger = self.ledger();
        let streams = match run {
            Ok(streams) => streams,
            Err(error) => {
                // Nothing of it ran, so nothing is told but to who waits.
                if let Ok(found) = ledger.process(process) {
                    found.note(Outcome::Ended);
                    found.end.send_replace(Some(End::now(NOT_STARTED)));
                    found.drained.send_replace(true);
                    found.attachment = None;
                }
                return Err(error);
            }
        };
        ledger.process(process)?.pid = guest.host_pid();
        let pid = self.started(&mut ledger, process);
        drop(ledger);
        self.watch_exec(guest, process.clone(), streams);
        pid
    }

    async fn run_exec(
        &self,
        guest: &dyn Guest,
        process: &ProcessId,
        new: NewProcess,
    ) -> Result<Streams, ServiceError> {
        guest.exec(process, new).await?;
        let owner = Owner { namespace: &self.0.namespace, id: &process.exec };
        let names = self.ledger().process(process)?.names.clone();
        let run = async {
            let (ends, attachment) = stdio::open(&names, owner).await?;
            let streams = guest.connect(process, ends).await?;
            // Entered before the start, so that its input can be closed while that is answered.
            let size = self.attach(process, attachment)?;
            give_size(guest, process, size).await;
            self.begin_input(process)?;
            guest.start(process).await?;
            Ok::<_, ServiceError>(streams)
        };
        let run = run.await;
        if run.is_err()
            && let Err(error) = guest.delete(process).await
        {
            log::debug!("{error}");
        }
        run
    }

    fn begin_input(&self, process: &ProcessId) -> Result<(), ServiceError> {
        let mut ledger = self.ledger();
        match &mut ledger.process(process)?.attachment {
            Some(attachment) => Ok(attachment.begin_input()?),
            None => Ok(()),
        }
    }

    /// Enters what moves a process's bytes; answers what size its terminal is to have.
    fn attach(
        &self,
        process: &ProcessId,
        mut attachment: Attachment,
    ) -> Result<Option<(u16, u16)>, ServiceError> {
        let mut ledger = self.ledger();
        let found = ledger.process(process)?;
        if found.input_is_closed {
            attachment.close_input();
        }
        found.attachment = Some(attachment);
        Ok(found.size)
    }

    /// Notes and tells a start, unless the guest was lost meanwhile.
    fn started(
        &self,
        ledger: &mut super::ledger::Ledger,
        process: &ProcessId,
    ) -> Result<u32, ServiceError> {
        let found = ledger.process(process)?;
        let pid = found.pid;
        if found.ended().is_some() {
            return Err(ledger.guest(&self.0.id).err().unwrap_or(ServiceError::Finished));
        }
        let event = if process.exec.is_empty() {
            let mut event = TaskStart::new();
            event.set_container_id(process.container.clone());
            event.set_pid(pid);
            Event::Start(event)
        } else {
            let mut event = TaskExecStarted::new();
            event.set_container_id(process.container.clone());
            event.set_exec_id(process.exec.clone());
            event.set_pid(pid);
            Event::ExecStarted(event)
        };
        self.0.publisher.push(&event);
        // Last, because whoever waits for this phase tells what comes next.
        found.note(Outcome::Started);
        Ok(pid)
    }

    /// Adds a process to a container. The guest hears of it when it starts.
    pub(super) fn exec(&self, request: ExecProcessRequest) -> Result<(), ServiceError> {
        if !bundle::is_id(&request.exec_id) {
            return Err(ServiceError::Id(request.exec_id));
        }
        let json = request.spec.value.clone();
        if let Err(error) = serde_json::from_slice::<oci_spec::runtime::Process>(&json) {
            return Err(ServiceError::Argument(format!("no OCI process: {error}")));
        }
        let names = Names {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let new = NewProcess { json, terminal: request.terminal, stdin: names.has_input() };
        let init = ProcessId { container: request.id.clone(), exec: String::new() };
        let mut ledger = self.ledger();
        ledger.admit(&init, Request::Exec)?;
        let container = ledger.container(&request.id)?;
        if container.execs.contains_key(&request.exec_id) {
            return Err(ServiceError::ProcessExists {
                container: request.id,
                exec: request.exec_id,
            });
        }
        container.execs.insert(request.exec_id.clone(), Process::new(names, Some(new), 0));
        let mut event = TaskExecAdded::new();
        event.set_container_id(request.id);
        event.set_exec_id(request.exec_id);
        self.0.publisher.push(&Event::ExecAdded(event));
        Ok(())
    }

    /// The guest, for requests about a container that is known.
    pub(super) fn guest_of(&self, process: &ProcessId) -> Result<Arc<dyn Guest>, ServiceError> {
        let mut ledger = self.ledger();
        ledger.process(process)?;
        ledger.guest(&self.0.id)
    }
}

/// Tells a terminal that is about to begin its size. A wrong one stops nobody.
async fn give_size(guest: &dyn Guest, process: &ProcessId, size: Option<(u16, u16)>) {
    if let Some((columns, rows)) = size
        && let Err(error) = guest.resize(process, columns, rows).await
    {
        log::warn!("the terminal is not resized: {error}");
    }
}
