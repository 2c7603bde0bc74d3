//! What the agent is asked of containers and their processes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nacre_proto::agent::{
    ContainerRequest, CreateContainerRequest, ExecRequest, NextEventRequest, ResizeTerminalRequest,
    SignalRequest, UpdateRequest, event::What,
};
use ttrpc::context::Context;

use crate::{
    agent::{Agent, AgentError, ProcessEnd, ProcessId, Stats, failed, request},
    log_file::printable,
};

impl Agent {
    /// Makes a container and leaves it before its execve.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn create(&self, request: &CreateContainerRequest) -> Result<(), AgentError> {
        let answer = self.client.create_container(self.context(), request).await;
        answer.map(drop).map_err(|error| failed("create the container", &error))
    }

    /// Adds a process to a container.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn exec(&self, request: &ExecRequest) -> Result<(), AgentError> {
        let answer = self.client.exec(self.context(), request).await;
        answer.map(drop).map_err(|error| failed("add a process", &error))
    }

    /// Lets a process run its program; answers when the execve is done, with its id in the guest.
    ///
    /// # Errors
    ///
    /// As each call; [`AgentError::Refused`] if the program can't be executed.
    pub async fn start(&self, process: &ProcessId) -> Result<u32, AgentError> {
        let answer = self.client.start(self.context(), &request(process)).await;
        let answer = answer.map_err(|error| failed("start the program", &error))?;
        Ok(answer.pid)
    }

    /// Sends a signal; with `all`, to every process of the container.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn signal(
        &self,
        process: &ProcessId,
        signal: i32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = SignalRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            signal: signal.unsigned_abs(),
            all,
            ..SignalRequest::default()
        };
        let answer = self.client.signal(self.context(), &request).await;
        answer.map(drop).map_err(|error| failed("send a signal", &error))
    }

    /// Waits for the end of a process, as long as it takes.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn wait(&self, process: &ProcessId) -> Result<ProcessEnd, AgentError> {
        let answer = self.client.wait(Context::default(), &request(process)).await;
        let answer = answer.map_err(|error| failed("wait for the program", &error))?;
        Ok(ProcessEnd {
            code: u8::try_from(answer.exit_code).unwrap_or(u8::MAX),
            at: moment(answer.exited_at_ns),
            out_of_memory: answer.oom_killed,
        })
    }

    /// Tells a terminal its size, in characters.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn resize(
        &self,
        process: &ProcessId,
        columns: u16,
        rows: u16,
    ) -> Result<(), AgentError> {
        let request = ResizeTerminalRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            columns: columns.into(),
            rows: rows.into(),
            ..ResizeTerminalRequest::default()
        };
        let answer = self.client.resize_terminal(self.context(), &request).await;
        answer.map(drop).map_err(|error| failed("resize the terminal", &error))
    }

    /// Forgets an ended process, and with an init its container.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn delete(&self, process: &ProcessId) -> Result<(), AgentError> {
        let answer = self.client.delete(self.context(), &request(process)).await;
        answer.map(drop).map_err(|error| failed("delete the process", &error))
    }

    /// Stops every process of a container where it is.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn pause(&self, container: &str) -> Result<(), AgentError> {
        let answer = self.client.pause(self.context(), &of(container)).await;
        answer.map(drop).map_err(|error| failed("pause the container", &error))
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn resume(&self, container: &str) -> Result<(), AgentError> {
        let answer = self.client.resume(self.context(), &of(container)).await;
        answer.map(drop).map_err(|error| failed("resume the container", &error))
    }

    /// Changes a container's limits, all or none: the `linux.resources` object of an OCI runtime
    /// specification as JSON.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = UpdateRequest {
            container_id: container.to_owned(),
            oci_resources: resources,
            ..UpdateRequest::default()
        };
        let answer = self.client.update(self.context(), &request).await;
        answer.map(drop).map_err(|error| failed("change the container's limits", &error))
    }

    /// What a container uses and used.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn stats(&self, container: &str) -> Result<Stats, AgentError> {
        let answer = self.client.stats(self.context(), &of(container)).await;
        let answer = answer.map_err(|error| failed("tell what the container uses", &error))?;
        Ok(Stats::checked(&answer))
    }

    /// Waits for the event after the one that is known, as long as it takes. Gives its number, and
    /// which container was out of memory if it tells of that.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn next_event(&self, after: u64) -> Result<(u64, Option<String>), AgentError> {
        let request = NextEventRequest { after, ..NextEventRequest::default() };
        let answer = self.client.next_event(Context::default(), &request).await;
        let answer = answer.map_err(|error| failed("tell of events", &error))?;
        let container = match answer.what {
            Some(What::OutOfMemory(container)) => Some(printable(&container.container_id)),
            _ => None,
        };
        Ok((answer.number, container))
    }
}

fn of(container: &str) -> ContainerRequest {
    ContainerRequest { container_id: container.to_owned(), ..ContainerRequest::default() }
}

/// A moment of the guest's, which can't be one to come.
pub(super) fn moment(since_epoch_ns: u64) -> SystemTime {
    let now = SystemTime::now();
    let told = UNIX_EPOCH.checked_add(Duration::from_nanos(since_epoch_ns));
    told.filter(|told| *told <= now).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_process_of_the_guest_s_ended_in_the_future() {
        let past = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(moment(1_700_000_000_000_000_000), past);
        let now = SystemTime::now();
        assert!(moment(u64::MAX) >= now && moment(u64::MAX) <= SystemTime::now());
    }
}
