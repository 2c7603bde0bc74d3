//! The one container of a sandbox that has one from the beginning.

use nacre_proto::agent::CreateContainerRequest;

use crate::{
    agent::ProcessId,
    fault::{self, Step},
    plan::Contents,
    sandbox::{
        Running, SandboxError,
        create::{AgentUp, VmUp},
    },
    streams::{Ends, Streams},
    timing,
};

impl AgentUp {
    /// Makes the container, connects its streams and starts its program.
    ///
    /// # Errors
    ///
    /// Fails if the agent refuses, a process ends, or there is no container in the plan.
    pub async fn start_container(self, ends: Ends) -> Result<Running, SandboxError> {
        let Self { agent, mut vm } = self;
        let functions = vm.functions().await?;
        let name = vm.base.plan.config.name.to_string();
        let planned = vm.base.plan.container.as_ref().ok_or(SandboxError::NoContainer)?;
        let terminal = ends.terminal;
        let request = CreateContainerRequest {
            container_id: name.clone(),
            oci_spec: serde_json::to_vec(&planned.spec).map_err(SandboxError::Spec)?,
            terminal,
            stdin: ends.input.is_some(),
            devices: planned.devices.clone(),
            functions,
            ..CreateContainerRequest::default()
        };
        vm.guarded(agent.create(&request)).await.map_err(|error| program_error(&vm, error))?;
        vm.base.timeline.mark("container made");
        fault::point(Step::CreateContainer)?;
        let process = ProcessId { container: name, exec: String::new() };
        let size = ends.size;
        let streams = vm.guarded(Streams::connect(agent.vsock(), &process, ends)).await?;
        fault::point(Step::Streams)?;
        if let (true, Some((columns, rows))) = (terminal, size) {
            vm.guarded(agent.resize(&process, columns, rows)).await?;
        }
        vm.guarded(agent.start(&process)).await.map_err(|error| program_error(&vm, error))?;
        vm.base.timeline.mark(timing::CONTAINER_STARTED);
        fault::point(Step::StartContainer)?;
        vm.runs(&agent, &process.container)?;
        Ok(Running::new(process, agent, streams, vm))
    }
}

/// Names the program in an error that is about it.
fn program_error(vm: &VmUp, error: SandboxError) -> SandboxError {
    match (error, &vm.base.plan.config.contents) {
        (SandboxError::Agent(source), Contents::Container(container))
            if source.is_not_found() || source.is_not_executable() =>
        {
            let program = container.process.arguments.first().cloned().unwrap_or_default();
            SandboxError::Program { program, source }
        }
        (error, _) => error,
    }
}
