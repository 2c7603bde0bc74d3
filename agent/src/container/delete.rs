//! Forgetting a process that has ended, or was never started; with the init goes its container.

use std::{fs, sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    container::{
        Container, ContainerError, Containers, Slot, create::remove_traces, exec::process_file,
        lock, of,
    },
    ids::{ContainerId, ExecId, ProcessId},
    launch::CAPABILITIES_SUFFIX,
    process::{Process, ProcessError},
};

/// How long a killed init may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

impl Containers {
    /// Forgets a process.
    pub(crate) async fn delete(&self, id: &ProcessId) -> Result<(), ContainerError> {
        let container = self.container(&id.container)?;
        match &id.exec {
            Some(exec) => forget(&container, id, exec),
            None => self.remove(container, &id.container).await,
        }
    }

    async fn remove(
        &self,
        container: Arc<Container>,
        id: &ContainerId,
    ) -> Result<(), ContainerError> {
        if !is_over_or_unstarted(&container.init) {
            return Err(ContainerError::NotEnded(container.init.id.clone()));
        }
        {
            let mut slots = self.slots();
            match slots.by_id.get_mut(id) {
                Some(slot @ Slot::Here(_)) => *slot = Slot::Busy,
                _ => return Err(ContainerError::Busy(id.clone())),
            }
        }
        if let Err(error) = end_unstarted(&container.init).await {
            // What could not be killed stays, under its name.
            self.slots().by_id.insert(id.clone(), Slot::Here(container));
            return Err(error);
        }
        container.init.stdio.close();
        for added in lock(&container.added).values() {
            added.process.stdio.close();
        }
        remove_traces(id).await;
        self.slots().by_id.remove(id);
        Ok(())
    }
}

fn is_over_or_unstarted(process: &Process) -> bool {
    process.exit().is_some() || process.is_unstarted()
}

/// A created init waits for its start; without one it must be killed.
async fn end_unstarted(init: &Process) -> Result<(), ContainerError> {
    match init.signal(libc::SIGKILL) {
        Ok(()) | Err(ProcessError::Ended | ProcessError::NotStarted) => {}
        Err(error) => return Err(of(&init.id)(error)),
    }
    match timeout(KILL_LIMIT, init.ended()).await {
        Ok(_exit) => Ok(()),
        Err(_elapsed) => Err(ContainerError::NotEnded(init.id.clone())),
    }
}

fn forget(container: &Container, id: &ProcessId, exec: &ExecId) -> Result<(), ContainerError> {
    let mut added = lock(&container.added);
    let Some(process) = added.get(exec) else {
        return Err(ContainerError::NotFound(id.clone()));
    };
    if !is_over_or_unstarted(&process.process) {
        return Err(ContainerError::NotEnded(id.clone()));
    }
    process.process.stdio.close();
    added.remove(exec);
    drop(added);
    let file = process_file(exec);
    for name in [format!("{file}{CAPABILITIES_SUFFIX}"), file] {
        let path = container.bundle.join(name);
        if path.exists() {
            fs::remove_file(&path).map_err(|source| ContainerError::File { path, source })?;
        }
    }
    Ok(())
}
