//! The steps of making a sandbox, one type each. See [`crate::sandbox`] for the chain.

use std::{
    fs::File,
    io::Read,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nacre_proto::{
    agent::{ConfigureSandboxRequest, CreateContainerRequest, Interface, Route},
    exit::VmmExit,
};
use tokio::time::{sleep, timeout};

use crate::{
    agent::{Agent, AgentError, ProcessId},
    backends::{BackendError, Backends, Surroundings, VmmEnd},
    child::{Child, ChildError, End},
    fault::{self, Step},
    log_file,
    network::address::{PREFIX_BITS, Pair},
    paths::SandboxFiles,
    plan::SandboxPlan,
    record::{Phase, ProcessRecord, Record, VERSION},
    sandbox::{Running, SandboxError, Settings, host::HostResources},
    streams::{Ends, Streams},
    timing::Timeline,
    vmm::{self, Vmm},
};

/// The longest path of a socket, in bytes (unix(7)).
const SOCKET_PATH_BYTES: usize = 107;
/// The pause between two attempts to reach the agent.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);
/// How many times the agent's time-out the guest may take although it makes progress.
const BOOT_FACTOR: u32 = 10;
/// How long to wait for the death that explains another one.
const EXPLANATION: Duration = Duration::from_secs(2);
/// How many lines of the guest's console an error carries.
const CONSOLE_LINES: usize = 12;

/// Decided, and nothing made.
#[derive(Debug)]
pub struct Planned {
    plan: SandboxPlan,
    settings: Settings,
    timeline: Timeline,
}

impl Planned {
    /// The beginning.
    #[must_use]
    pub fn new(plan: SandboxPlan, settings: Settings, timeline: Timeline) -> Self {
        Self { plan, settings, timeline }
    }

    /// Claims the name and makes what the host has for the sandbox.
    ///
    /// # Errors
    ///
    /// Fails if the name is in use or the host refuses.
    pub fn claim(self) -> Result<Claimed, SandboxError> {
        let Self { plan, settings, mut timeline } = self;
        let registration = settings.registry.claim(record(&plan))?;
        let files = registration.files().clone();
        let host = HostResources::create(&plan, registration)?;
        if files.vsock().as_os_str().len() > SOCKET_PATH_BYTES {
            return Err(SandboxError::SocketPath(files.vsock()));
        }
        timeline.mark("planned, name and network claimed");
        Ok(Claimed { host, base: Base { plan, settings, files, timeline } })
    }
}

fn record(plan: &SandboxPlan) -> Record {
    let config = &plan.config;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Record {
        version: VERSION,
        name: config.name.clone(),
        supervisor: ProcessRecord::this("supervisor"),
        phase: Phase::Creating,
        created_s: created.as_secs(),
        command: config.process.arguments.clone(),
        env: environment(plan),
        rootfs: config.rootfs.clone(),
        cpus: config.cpus,
        memory_bytes: config.memory.0,
        children: Vec::new(),
        network: None,
        cgroup: None,
    }
}

/// What added processes inherit.
fn environment(plan: &SandboxPlan) -> Vec<String> {
    let process = plan.spec.process().as_ref();
    process.and_then(|process| process.env().clone()).unwrap_or_default()
}

/// What every step reads.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) plan: SandboxPlan,
    pub(super) settings: Settings,
    pub(super) files: SandboxFiles,
    pub(super) timeline: Timeline,
}

impl Base {
    fn surroundings<'a>(&'a self, host: &'a HostResources) -> Surroundings<'a> {
        Surroundings {
            programs: &self.settings.programs,
            files: &self.files,
            cgroup: host.cgroup.as_ref(),
            log_level: self.settings.log_level,
        }
    }
}

/// The name is ours.
#[derive(Debug)]
pub struct Claimed {
    host: HostResources,
    base: Base,
}

impl Claimed {
    /// The sandbox's files.
    #[must_use]
    pub fn files(&self) -> &SandboxFiles {
        &self.base.files
    }

    /// Starts a backend for each device, side by side, and waits until all are ready.
    ///
    /// # Errors
    ///
    /// Fails if one can't be started.
    pub async fn spawn_backends(self) -> Result<BackendsUp, SandboxError> {
        let Self { host, base } = self;
        let (backends, ends) =
            Backends::start(&base.plan.devices, base.surroundings(&host), host.network.as_ref())?;
        let mut up = BackendsUp { backends, ends, host, base };
        fault::point(Step::BackendsSpawned)?;
        record_children(&mut up.host, up.backends.children())?;
        up.backends.ready().await?;
        up.base.timeline.mark("backends ready");
        fault::point(Step::BackendsReady)?;
        Ok(up)
    }
}

fn record_children<'a>(
    host: &mut HostResources,
    children: impl Iterator<Item = &'a Child>,
) -> Result<(), SandboxError> {
    let Some(registration) = &mut host.registration else { return Ok(()) };
    let children: Vec<ProcessRecord> = children.map(Child::record).collect();
    Ok(registration.update(|record| record.children.extend(children))?)
}

/// All backends serve.
#[derive(Debug)]
pub struct BackendsUp {
    backends: Backends,
    ends: Vec<VmmEnd>,
    host: HostResources,
    base: Base,
}

impl BackendsUp {
    /// Starts the VMM on them.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started; that it ends again is seen by the next step.
    pub fn start_vmm(self) -> Result<VmUp, SandboxError> {
        let Self { backends, ends, host, base } = self;
        let vmm = Vmm::start(&base.plan, base.surroundings(&host), ends)?;
        let mut up = VmUp { vmm, backends, host, base };
        up.base.timeline.mark("VMM started");
        record_children(&mut up.host, std::iter::once(up.vmm.child()))?;
        fault::point(Step::Vmm)?;
        Ok(up)
    }
}

/// The guest boots. In the order of the fields it is taken down.
#[derive(Debug)]
pub struct VmUp {
    pub(super) vmm: Vmm,
    pub(super) backends: Backends,
    pub(super) host: HostResources,
    pub(super) base: Base,
}

impl VmUp {
    /// Resolves when a process that the sandbox can't do without has ended, with the reason.
    async fn death(&self) -> SandboxError {
        tokio::select! {
            end = self.vmm.child().ended() => match end {
                Ok(end) => self.vmm_ended(end).await,
                Err(error) => BackendError::Child(ChildError::Watch {
                    name: "nacre-vmm".to_owned(),
                    source: error,
                }).into(),
            },
            error = self.backends.ended() => self.backend_ended(error).await,
        }
    }

    async fn vmm_ended(&self, end: End) -> SandboxError {
        if matches!(vmm::meaning(end), Some(VmmExit::Backend | VmmExit::Failed)) {
            let backend = timeout(EXPLANATION, self.backends.ended()).await;
            if let Ok(error @ BackendError::Ended { end, .. }) = backend
                && end != End::Code(0)
            {
                return error.into();
            }
        }
        SandboxError::VmmEnded {
            end,
            last_words: self.vmm.child().last_words(),
            console: self.console_tail(),
        }
    }

    async fn backend_ended(&self, error: BackendError) -> SandboxError {
        // A backend whose connection is over ends in order: then it was the VMM that went first.
        if let BackendError::Ended { end: End::Code(0), .. } = error
            && let Some(end) = self.vmm.child().ended_within(EXPLANATION).await
        {
            return SandboxError::VmmEnded {
                end,
                last_words: self.vmm.child().last_words(),
                console: self.console_tail(),
            };
        }
        error.into()
    }

    fn console_tail(&self) -> Option<String> {
        log_file::tail(&self.base.files.console(), CONSOLE_LINES)
    }

    /// Waits for `work` and for the death of a process; a death explains a broken connection.
    pub(super) async fn guarded<T, E: Into<SandboxError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, SandboxError> {
        let error = tokio::select! {
            biased;
            result = work => match result {
                Ok(value) => return Ok(value),
                Err(error) => error.into(),
            },
            death = self.death() => return Err(death),
        };
        let broken = matches!(
            error,
            SandboxError::Agent(
                AgentError::Lost { .. } | AgentError::Unreachable(_) | AgentError::Mute
            ) | SandboxError::Stream(_)
        );
        if broken && let Ok(death) = timeout(EXPLANATION, self.death()).await {
            return Err(death);
        }
        Err(error)
    }

    /// Waits for the guest's agent and configures the guest.
    ///
    /// # Errors
    ///
    /// Fails if a process ends, or the guest boots for too long without a sign of progress.
    pub async fn connect_agent(mut self) -> Result<AgentUp, SandboxError> {
        let agent = self.reach_agent().await?;
        self.base.timeline.mark("agent ready");
        fault::point(Step::Agent)?;
        let request = self.configuration()?;
        self.guarded(agent.configure(&request)).await?;
        self.base.timeline.mark("guest configured");
        fault::point(Step::Configure)?;
        Ok(AgentUp { agent, vm: self })
    }

    async fn reach_agent(&self) -> Result<Agent, SandboxError> {
        let limit = self.base.settings.agent_timeout;
        let vsock = self.base.files.vsock();
        let mut console = self.vmm.console();
        let begun = Instant::now();
        let mut last_progress = begun;
        loop {
            let attempt = tokio::select! {
                attempt = Agent::connect(&vsock, limit) => attempt,
                death = self.death() => return Err(death),
            };
            let silent = match attempt {
                Ok(agent) => return Ok(agent),
                Err(error @ AgentError::Version(_)) => return Err(error.into()),
                Err(error) => {
                    log::trace!("no agent yet: {error}");
                    // The connection was taken and then nothing came: that is not booting.
                    matches!(error, AgentError::Lost { .. })
                }
            };
            if console.has_changed().unwrap_or(false) {
                console.mark_unchanged();
                last_progress = Instant::now();
            }
            let waited = last_progress.elapsed();
            if (silent && begun.elapsed() >= limit)
                || waited >= limit
                || begun.elapsed() >= limit * BOOT_FACTOR
            {
                return Err(SandboxError::AgentSilent { waited, console: self.console_tail() });
            }
            tokio::select! {
                () = sleep(BETWEEN_ATTEMPTS) => {}
                death = self.death() => return Err(death),
            }
        }
    }

    fn configuration(&self) -> Result<ConfigureSandboxRequest, SandboxError> {
        let plan = &self.base.plan;
        let mut seed = vec![0; 64];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut seed))
            .map_err(SandboxError::Random)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (interfaces, routes) = match &self.host.network {
            None => (Vec::new(), Vec::new()),
            Some(network) => interface(network.pair),
        };
        Ok(ConfigureSandboxRequest {
            hostname: plan.hostname.clone(),
            realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            random_seed: seed,
            interfaces,
            routes,
            nameservers: plan.nameservers.iter().map(ToString::to_string).collect(),
            storages: plan.storages.clone(),
            ..ConfigureSandboxRequest::default()
        })
    }
}

fn interface(pair: Pair) -> (Vec<Interface>, Vec<Route>) {
    let interface = Interface {
        mac: pair.mac(),
        name: "eth0".to_owned(),
        mtu: 1500,
        addresses: vec![format!("{}/{PREFIX_BITS}", pair.guest())],
        ..Interface::default()
    };
    let route = Route {
        gateway: pair.host().to_string(),
        interface: "eth0".to_owned(),
        ..Route::default()
    };
    (vec![interface], vec![route])
}

/// The guest is ready for containers.
pub struct AgentUp {
    agent: Agent,
    vm: VmUp,
}

impl AgentUp {
    /// Makes the container, connects its streams and starts its program.
    ///
    /// # Errors
    ///
    /// Fails if the agent refuses or a process ends.
    pub async fn start_container(self, ends: Ends) -> Result<Running, SandboxError> {
        let Self { agent, mut vm } = self;
        let plan = &vm.base.plan;
        let container = plan.config.name.to_string();
        let terminal = ends.terminal;
        let request = CreateContainerRequest {
            container_id: container.clone(),
            oci_spec: serde_json::to_vec(&plan.spec).map_err(SandboxError::Spec)?,
            terminal,
            stdin: ends.input.is_some(),
            devices: plan.container_devices.clone(),
            ..CreateContainerRequest::default()
        };
        vm.guarded(agent.create(&request)).await.map_err(|error| program_error(&vm, error))?;
        vm.base.timeline.mark("container made");
        fault::point(Step::CreateContainer)?;
        let process = ProcessId { container, exec: String::new() };
        let size = ends.size;
        let streams = vm.guarded(Streams::connect(agent.vsock(), &process, ends)).await?;
        fault::point(Step::Streams)?;
        if let (true, Some((columns, rows))) = (terminal, size) {
            vm.guarded(agent.resize(&process, columns, rows)).await?;
        }
        vm.guarded(agent.start(&process)).await.map_err(|error| program_error(&vm, error))?;
        vm.base.timeline.mark("program started");
        fault::point(Step::StartContainer)?;
        if let Some(registration) = &mut vm.host.registration {
            registration.update(|record| record.phase = Phase::Running)?;
            if vm.base.settings.keep {
                registration.stay();
            }
        }
        Ok(Running::new(process, agent, streams, vm))
    }
}

/// Names the program in an error that is about it.
fn program_error(vm: &VmUp, error: SandboxError) -> SandboxError {
    match error {
        SandboxError::Agent(source) if source.is_not_found() || source.is_not_executable() => {
            let program = vm.base.plan.config.process.arguments.first();
            SandboxError::Program { program: program.cloned().unwrap_or_default(), source }
        }
        error => error,
    }
}
