//! Letting a process execute its program, and telling whether it did.

use std::{os::fd::OwnedFd, sync::Arc};

use rustix::process::Pid;

use crate::{
    container::{
        AddedProcess, Container, ContainerError, Containers, exec::process_file, illegal, lock, of,
        record_end,
    },
    ids::{ExecId, ProcessId},
    launch::{
        Kind, Order,
        spawn::{Launch, LaunchError},
    },
    process::{
        reap::{Launching, now_ns},
        state::{Event, Exit},
        stdio::Inherited,
    },
};

/// What the start of an added process needs.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) inherited: Inherited,
    /// For messages.
    pub(super) program: String,
}

impl Containers {
    /// Starts a process; gives its number once its program runs.
    pub(crate) async fn start(&self, id: &ProcessId) -> Result<u32, ContainerError> {
        let container = self.container(&id.container)?;
        let pid = match &id.exec {
            None => start_init(&container).await?,
            Some(exec) => self.start_added(&container, id, exec).await?,
        };
        Ok(u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0))
    }

    async fn start_added(
        &self,
        container: &Container,
        id: &ProcessId,
        exec: &ExecId,
    ) -> Result<Pid, ContainerError> {
        let added = lock(&container.added).get(exec).cloned();
        let added = added.ok_or_else(|| ContainerError::NotFound(id.clone()))?;
        if !container.init.is_running() {
            return Err(ContainerError::NotRunning(id.container.clone()));
        }
        // A new process would not get as far as its program.
        if container.cgroup.is_frozen() {
            return Err(ContainerError::Paused(id.container.clone()));
        }
        added.process.apply(Event::Start).map_err(illegal(id))?;
        let pending = lock(&added.pending).take();
        let pending = pending.ok_or_else(|| ContainerError::NotFound(id.clone()))?;
        let started = self.join(container, &added, exec, pending).await;
        if let Err(error) = &started {
            never_ran(&added, error);
        }
        started
    }

    async fn join(
        &self,
        container: &Container,
        added: &AddedProcess,
        exec: &ExecId,
        pending: Pending,
    ) -> Result<Pid, ContainerError> {
        let process = &added.process;
        let Pending { inherited, program } = pending;
        let order = Order {
            container_id: process.id.container.to_string(),
            kind: Kind::Join { process_file: process_file(exec) },
            terminal: process.has_terminal(),
            size: process.size(),
        };
        let launching = self.reaper.launching();
        let launched = launch(&launching, &order, inherited).await;
        let (pid, terminal) =
            launched.map_err(|source| ContainerError::Launch { what: program, source })?;
        let (live, end) = launching.follow(pid)?;
        if let Some(live) = live {
            process.apply(Event::Executed(live)).map_err(illegal(&process.id))?;
        }
        record_end(Arc::clone(process), Arc::clone(&container.killings), end);
        if let Some(terminal) = terminal {
            process.set_terminal(terminal).map_err(of(&process.id))?;
        }
        Ok(pid)
    }
}

async fn launch(
    launching: &Launching<'_>,
    order: &Order,
    inherited: Inherited,
) -> Result<(Pid, Option<OwnedFd>), LaunchError> {
    let launch = Launch::order(launching, order, inherited)?;
    match launch.made().await {
        Ok(made) => {
            launch.executed().await?;
            Ok(made)
        }
        // libcontainer's words for a refused execve are its own; the status pipe has the number.
        Err(LaunchError::Refused(reason)) => match launch.executed().await {
            Ok(()) | Err(LaunchError::Died) => Err(LaunchError::Refused(reason)),
            Err(precise) => Err(precise),
        },
        Err(other) => Err(other),
    }
}

async fn start_init(container: &Container) -> Result<Pid, ContainerError> {
    let init = &container.init;
    init.apply(Event::Start).map_err(illegal(&init.id))?;
    let failed = |source| ContainerError::Launch { what: container.program.clone(), source };
    let Some(live) = init.live() else {
        return Err(failed(LaunchError::Died));
    };
    container.launch.start().map_err(failed)?;
    container.launch.executed().await.map_err(failed)?;
    let pid = live.pid;
    init.apply(Event::Executed(live)).map_err(illegal(&init.id))?;
    Ok(pid)
}

/// An added process that could not be started is over, with a shell's codes.
fn never_ran(added: &AddedProcess, error: &ContainerError) {
    let code = match error {
        ContainerError::Launch { source: LaunchError::NoProgram, .. } => 127,
        _ => 126,
    };
    let exit = Exit { code, signal: 0, at_ns: now_ns(), oom_killed: false };
    // It may have run and ended, if only its terminal failed.
    if added.process.apply(Event::Ended(exit)).is_ok() {
        added.process.stdio.close();
    }
}
