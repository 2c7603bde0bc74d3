//! The ttrpc service: messages to typed requests, errors to status codes, and no logic between.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use nacre_proto::{
    AGENT_MAJOR, AGENT_MINOR,
    agent::{
        AttachDeviceResponse, ConfigureSandboxRequest, ConfigureSandboxResponse, ContainerRequest,
        CreateContainerRequest, CreateContainerResponse, DeleteResponse, DetachDeviceResponse,
        DeviceRequest, Event, ExecRequest, ExecResponse, HelloRequest, HelloResponse,
        NextEventRequest, PauseResponse, ProcessRequest, ResizeTerminalRequest,
        ResizeTerminalResponse, ResumeResponse, ShutdownRequest, ShutdownResponse, SignalRequest,
        SignalResponse, StartResponse, StatsResponse, UnwrittenRequest, UnwrittenResponse,
        UpdateRequest, UpdateResponse, UseResourcesRequest, UseResourcesResponse, WaitResponse,
    },
    agent_ttrpc::Agent,
};
use rustix::system::{sysinfo, uname};
use tokio::sync::Notify;
use ttrpc::{Code, r#async::TtrpcContext, error::get_rpc_status};

use crate::{
    container::{ContainerError, Containers, NamespaceRequest, NewContainer, NewProcess},
    devices::{
        function::FunctionRequest,
        give::{self, GiveError},
        order::Order,
    },
    ids::{ContainerId, ExecId, ProcessId},
    monotonic::Monotonic,
    process::{ProcessError, Size, stdio::Wiring},
    resources::{self, Used},
    sandbox::{Sandbox, SandboxError, disks::DiskRequest, storage::StoragePlan},
    shutdown,
    text::chain,
};

/// The highest signal number.
const SIGNAL_MAX: u32 = 64;

/// The agent's service.
pub(crate) struct Service {
    containers: Arc<Containers>,
    sandbox: Arc<Sandbox>,
    /// Told when the guest is to go off.
    done: Arc<Notify>,
    /// When this process did.
    began: Monotonic,
}

impl Service {
    pub(crate) fn new(
        containers: Arc<Containers>,
        sandbox: Sandbox,
        done: Arc<Notify>,
        began: Monotonic,
    ) -> Self {
        Self { containers, sandbox: Arc::new(sandbox), done, began }
    }
}

fn refused(error: &ContainerError) -> ttrpc::Error {
    get_rpc_status(error.code(), chain(error))
}

fn not_configured(error: &SandboxError) -> ttrpc::Error {
    get_rpc_status(error.code(), chain(error))
}

fn not_given(error: &GiveError) -> ttrpc::Error {
    get_rpc_status(error.code(), chain(error))
}

fn invalid(what: impl Into<String>) -> ttrpc::Error {
    get_rpc_status(Code::INVALID_ARGUMENT, what.into())
}

fn process_id(container: &str, exec: &str) -> ttrpc::Result<ProcessId> {
    ProcessId::parse(container, exec).map_err(|error| refused(&error.into()))
}

fn container_id(id: &str) -> ttrpc::Result<ContainerId> {
    ContainerId::parse(id).map_err(|error| refused(&error.into()))
}

/// Runs work that must not be left half-done when the host's connection is lost.
async fn to_its_end<T, E>(
    work: impl Future<Output = Result<T, E>> + Send + 'static,
    refused: impl FnOnce(&E) -> ttrpc::Error,
) -> ttrpc::Result<T>
where
    T: Send + 'static,
    E: Send + 'static,
{
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|error| refused(&error)),
        Err(error) => Err(get_rpc_status(Code::INTERNAL, format!("the work broke off: {error}"))),
    }
}

fn wiring(terminal: bool, stdin: bool) -> Wiring {
    if terminal { Wiring::Terminal } else { Wiring::Pipes { stdin } }
}

fn new_container(request: CreateContainerRequest) -> Result<NewContainer, ContainerError> {
    let disk = |device: &nacre_proto::agent::Device| {
        DiskRequest::parse(&device.serial, &device.container_path, device.read_only)
    };
    let id = ContainerId::parse(&request.container_id)?;
    Ok(NewContainer {
        wiring: wiring(request.terminal, request.stdin),
        disks: request.devices.iter().map(disk).collect::<Result<_, _>>()?,
        functions: FunctionRequest::parse_all(&request.functions)?,
        storages: StoragePlan::parse_for(&id, &request.storages)?,
        namespaces: NamespaceRequest::parse_all(&request.namespaces)?,
        id,
        oci_spec: request.oci_spec,
    })
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        if request.major != AGENT_MAJOR {
            let theirs = request.major;
            let text = format!("the agent speaks version {AGENT_MAJOR}, not {theirs}");
            return Err(get_rpc_status(Code::FAILED_PRECONDITION, text));
        }
        let info = sysinfo();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(HelloResponse {
            major: AGENT_MAJOR,
            minor: AGENT_MINOR,
            kernel_release: uname().release().to_string_lossy().into_owned(),
            online_cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_bytes: info.totalram.saturating_mul(u64::from(info.mem_unit)),
            began_ns: self.began.ns(),
            now_ns: Monotonic::now().ns(),
            ..HelloResponse::new()
        })
    }

    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> ttrpc::Result<ConfigureSandboxResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        to_its_end(async move { sandbox.configure(request).await }, not_configured).await?;
        Ok(ConfigureSandboxResponse::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let new = new_container(request).map_err(|error| refused(&error))?;
        let containers = Arc::clone(&self.containers);
        let pid = to_its_end(async move { containers.create(new).await }, refused).await?;
        Ok(CreateContainerResponse { pid, ..CreateContainerResponse::new() })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<StartResponse> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        let containers = Arc::clone(&self.containers);
        let pid = to_its_end(async move { containers.start(&id).await }, refused).await?;
        Ok(StartResponse { pid, ..StartResponse::new() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ExecResponse> {
        let exec = ExecId::parse(&request.exec_id).map_err(|error| refused(&error.into()))?;
        let new = NewProcess {
            id: process_id(&request.container_id, &request.exec_id)?,
            wiring: wiring(request.terminal, request.stdin),
            oci_process: request.oci_process,
        };
        self.containers.add(&exec, &new).map_err(|error| refused(&error))?;
        Ok(ExecResponse::new())
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: SignalRequest,
    ) -> ttrpc::Result<SignalResponse> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        if !(1..=SIGNAL_MAX).contains(&request.signal) {
            return Err(invalid(format!("no signal {}", request.signal)));
        }
        if request.all && id.exec.is_some() {
            return Err(invalid("all processes are a container's, not an added process's"));
        }
        let signal = i32::try_from(request.signal).map_err(|error| invalid(error.to_string()))?;
        self.containers.signal(&id, signal, request.all).map_err(|error| refused(&error))?;
        Ok(SignalResponse::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        let process = self.containers.process(&id).map_err(|error| refused(&error))?;
        let exit = process.ended().await;
        Ok(WaitResponse {
            exit_code: exit.code,
            signal: exit.signal,
            oom_killed: exit.oom_killed,
            exited_at_ns: exit.at_ns,
            ..WaitResponse::new()
        })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<ResizeTerminalResponse> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        let cells = |count: u32| {
            u16::try_from(count).map_err(|_error| invalid(format!("a terminal of {count} cells")))
        };
        let size = Size { columns: cells(request.columns)?, rows: cells(request.rows)? };
        let process = self.containers.process(&id).map_err(|error| refused(&error))?;
        process
            .resize(size)
            .map_err(|source: ProcessError| refused(&ContainerError::Process { id, source }))?;
        Ok(ResizeTerminalResponse::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        let containers = Arc::clone(&self.containers);
        to_its_end(async move { containers.delete(&id).await }, refused).await?;
        Ok(DeleteResponse::new())
    }

    async fn unwritten(
        &self,
        _: &TtrpcContext,
        _request: UnwrittenRequest,
    ) -> ttrpc::Result<UnwrittenResponse> {
        let bytes = shutdown::unwritten_bytes().map_err(|error| {
            get_rpc_status(Code::INTERNAL, format!("can't read /proc/meminfo: {error}"))
        })?;
        Ok(UnwrittenResponse { bytes, ..UnwrittenResponse::new() })
    }

    async fn use_resources(
        &self,
        _: &TtrpcContext,
        request: UseResourcesRequest,
    ) -> ttrpc::Result<UseResourcesResponse> {
        let wanted = Used { cpus: request.cpus, memory_bytes: request.memory_bytes };
        let within = Duration::from_millis(request.within_ms.into());
        let used = resources::use_all(wanted, within).await.map_err(|error| {
            get_rpc_status(Code::INTERNAL, format!("can't tell what there is: {error}"))
        })?;
        Ok(UseResourcesResponse {
            online_cpus: used.cpus,
            memory_bytes: used.memory_bytes,
            ..UseResourcesResponse::new()
        })
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<PauseResponse> {
        let id = container_id(&request.container_id)?;
        let containers = Arc::clone(&self.containers);
        to_its_end(async move { containers.pause(&id).await }, refused).await?;
        Ok(PauseResponse::new())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ResumeResponse> {
        let id = container_id(&request.container_id)?;
        let containers = Arc::clone(&self.containers);
        to_its_end(async move { containers.resume(&id).await }, refused).await?;
        Ok(ResumeResponse::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: UpdateRequest,
    ) -> ttrpc::Result<UpdateResponse> {
        let id = container_id(&request.container_id)?;
        let updated = self.containers.update(&id, &request.oci_resources);
        updated.map_err(|error| refused(&error))?;
        Ok(UpdateResponse::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<StatsResponse> {
        let id = container_id(&request.container_id)?;
        self.containers.stats(&id).map_err(|error| refused(&error))
    }

    async fn next_event(
        &self,
        _: &TtrpcContext,
        request: NextEventRequest,
    ) -> ttrpc::Result<Event> {
        Ok(self.containers.events().next(request.after).await)
    }

    async fn attach_device(
        &self,
        _: &TtrpcContext,
        request: DeviceRequest,
    ) -> ttrpc::Result<AttachDeviceResponse> {
        let order = Order::parse(request).map_err(|error| not_given(&error))?;
        let containers = Arc::clone(&self.containers);
        let given = async move { give::give(&containers, order).await };
        let names = to_its_end(given, not_given).await?;
        Ok(AttachDeviceResponse { names, ..AttachDeviceResponse::new() })
    }

    async fn detach_device(
        &self,
        _: &TtrpcContext,
        request: DeviceRequest,
    ) -> ttrpc::Result<DetachDeviceResponse> {
        let order = Order::parse(request).map_err(|error| not_given(&error))?;
        let containers = Arc::clone(&self.containers);
        let taken = async move { give::take(&containers, order).await };
        to_its_end(taken, not_given).await?;
        Ok(DetachDeviceResponse::new())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _request: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        let containers = Arc::clone(&self.containers);
        let end = async move {
            shutdown::end_everything(&containers).await;
            Ok(())
        };
        to_its_end(end, refused).await?;
        self.done.notify_one();
        Ok(ShutdownResponse::new())
    }
}
