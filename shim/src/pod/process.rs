//! Processes of a pod's containers: their first ones, and those that were added.

use nacre_proto::agent::ExecRequest;

use crate::{
    agent::{ProcessEnd, ProcessId, Stats},
    pod::{Pod, PodError},
    streams::{Ends, Streams},
};

impl Pod {
    /// Adds a process to a container, by the `process` object of an OCI runtime specification.
    ///
    /// # Errors
    ///
    /// Fails if the agent refuses or the pod is no more, as each call of this file.
    pub async fn exec(
        &self,
        process: &ProcessId,
        process_json: Vec<u8>,
        terminal: bool,
        stdin: bool,
    ) -> Result<(), PodError> {
        let request = ExecRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            oci_process: process_json,
            terminal,
            stdin,
            ..ExecRequest::default()
        };
        self.shared.guarded(self.shared.ways.agent.exec(&request)).await
    }

    /// Connects the standard streams of a process. To be done before it is started.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn connect_streams(
        &self,
        process: &ProcessId,
        ends: Ends,
    ) -> Result<Streams, PodError> {
        let vsock = self.shared.ways.agent.vsock();
        self.shared.guarded(Streams::connect(vsock, process, ends)).await
    }

    /// Lets a process run its program; answers when that does, with its id in the guest.
    ///
    /// # Errors
    ///
    /// As each call; also if the program can't be executed.
    pub async fn start_process(&self, process: &ProcessId) -> Result<u32, PodError> {
        self.shared.guarded(self.shared.ways.agent.start(process)).await
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
    ) -> Result<(), PodError> {
        self.shared.guarded(self.shared.ways.agent.signal(process, signal, all)).await
    }

    /// Waits for the end of a process, as long as it takes.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn wait(&self, process: &ProcessId) -> Result<ProcessEnd, PodError> {
        self.shared.guarded(self.shared.ways.agent.wait(process)).await
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
    ) -> Result<(), PodError> {
        self.shared.guarded(self.shared.ways.agent.resize(process, columns, rows)).await
    }

    /// Forgets an ended process, and with a first one its container and all that it had.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn delete(&self, process: &ProcessId) -> Result<(), PodError> {
        if process.exec.is_empty() {
            return self.remove(process).await;
        }
        self.shared.guarded(self.shared.ways.agent.delete(process)).await
    }

    /// Stops every process of a container where it is.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn pause(&self, container: &str) -> Result<(), PodError> {
        self.shared.guarded(self.shared.ways.agent.pause(container)).await
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn resume(&self, container: &str) -> Result<(), PodError> {
        self.shared.guarded(self.shared.ways.agent.resume(container)).await
    }

    /// What a container uses and used.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn stats(&self, container: &str) -> Result<Stats, PodError> {
        self.shared.guarded(self.shared.ways.agent.stats(container)).await
    }
}
