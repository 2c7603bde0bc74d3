//! The steps of making a sandbox, one type each. See [`crate::sandbox`] for the chain.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::{Mutex, mpsc};

use crate::{
    agent::Agent,
    backends::{Backends, Devices, Surroundings, VmmEnd},
    cgroup::CgroupError,
    fault::{self, Step},
    passthrough::{
        PassthroughError,
        memlock::{self, Raised},
    },
    paths::SandboxFiles,
    plan::{Contents, SandboxConfig, SandboxPlan},
    record::{Phase, ProcessRecord, Record, VERSION},
    registry::RegistryError,
    sandbox::{
        SandboxError, Settings,
        change::{Errand, Operator},
        control::ControlSocket,
        host::HostResources,
    },
    timing::{self, Timeline},
    vmm::Vmm,
};

/// The longest path of a socket, in bytes (unix(7)).
const SOCKET_PATH_BYTES: usize = 107;

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
    let container = match &config.contents {
        Contents::Container(container) => Some(container),
        Contents::Pod { .. } => None,
    };
    let command = container.map(|container| container.process.arguments.clone());
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Record {
        version: VERSION,
        name: config.name.clone(),
        supervisor: ProcessRecord::this("supervisor"),
        phase: Phase::Creating,
        created_s: created.as_secs(),
        command: command.unwrap_or_default(),
        env: environment(plan),
        rootfs: container.map(|container| container.rootfs.clone()).unwrap_or_default(),
        cpus: config.cpus,
        memory_bytes: config.memory.0,
        max_cpus: plan.max_cpus,
        max_memory_bytes: plan.max_memory.0,
        children: Vec::new(),
        network: None,
        joined: Vec::new(),
        added_networks: BTreeMap::new(),
        cgroup: None,
        bindings: Vec::new(),
    }
}

/// What added processes inherit.
fn environment(plan: &SandboxPlan) -> Vec<String> {
    let process = plan.container.as_ref().and_then(|container| container.spec.process().as_ref());
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
    fn surroundings(&self, host: &HostResources) -> Result<Surroundings, CgroupError> {
        let Settings { programs, log_level, .. } = &self.settings;
        Surroundings::new(programs.clone(), self.files.clone(), *log_level)
            .within(host.cgroup.as_ref())
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
        let surroundings = base.surroundings(&host)?;
        let (backends, ends) = Backends::start(&base.plan.devices, &surroundings, &host.nics)?;
        let mut up = BackendsUp { backends, ends, host, base };
        fault::point(Step::BackendsSpawned)?;
        record_children(&mut up.host, up.backends.records())?;
        up.backends.ready().await.map_err(SandboxError::BackendStart)?;
        up.base.timeline.mark("backends ready");
        fault::point(Step::BackendsReady)?;
        Ok(up)
    }
}

pub(super) fn record_children(
    host: &mut HostResources,
    children: Vec<ProcessRecord>,
) -> Result<(), RegistryError> {
    let Some(registration) = &mut host.registration else { return Ok(()) };
    registration.update(|record| record.children = children)
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
        let given = host.open_devices(&base.plan)?;
        let _raised = memlock(&base.plan)?;
        let vmm = Vmm::start(&base.plan, &base.surroundings(&host)?, ends, given)?;
        let devices = backends.keep(&vmm.link());
        let path = base.files.control();
        let control = ControlSocket::open(path.clone(), devices.roster().clone(), vmm.link())
            .map_err(|source| SandboxError::Control { path, source })?;
        let errands = mpsc::channel(1);
        let mut up = VmUp { control, vmm, devices, errands, host, base };
        up.base.timeline.mark(timing::VMM_START);
        up.record_children()?;
        fault::point(Step::Vmm)?;
        Ok(up)
    }
}

/// Lets the VMM lock what the devices that it is given need, as long as the answer lives.
fn memlock(plan: &SandboxPlan) -> Result<Option<Raised>, PassthroughError> {
    let SandboxConfig { passthrough, .. } = &plan.config;
    let needed = memlock::needed(plan.max_memory, passthrough.len());
    (!passthrough.is_empty()).then(|| Raised::to(needed)).transpose()
}

/// The guest boots. In the order of the fields it is taken down.
pub struct VmUp {
    pub(super) control: ControlSocket,
    pub(super) vmm: Vmm,
    pub(super) devices: Devices,
    /// What changes of the sandbox need its own task for.
    pub(super) errands: (mpsc::Sender<Errand>, mpsc::Receiver<Errand>),
    pub(super) host: HostResources,
    pub(super) base: Base,
}

impl VmUp {
    /// Whoever changes the sandbox, for `container`, if there is the one.
    fn operator(&self, agent: &Agent, container: &str) -> Result<Operator, CgroupError> {
        Ok(Operator {
            link: self.vmm.link(),
            agent: agent.clone(),
            surroundings: self.base.surroundings(&self.host)?,
            roster: self.devices.roster().clone(),
            container: container.to_owned(),
            errands: self.errands.0.clone(),
            functions: Mutex::new(self.base.plan.functions()),
        })
    }

    /// From now on the sandbox runs: that is written down, and it can be changed.
    pub(super) fn runs(
        &mut self,
        agent: &Agent,
        container: &str,
    ) -> Result<Arc<Operator>, SandboxError> {
        if let Some(registration) = &mut self.host.registration {
            registration.update(|record| record.phase = Phase::Running)?;
            if self.base.settings.keep {
                registration.stay();
            }
        }
        let operator = Arc::new(self.operator(agent, container)?);
        self.control.employ(Arc::clone(&operator));
        Ok(operator)
    }

    /// Writes down which processes there are now.
    pub(super) fn record_children(&mut self) -> Result<(), RegistryError> {
        let mut children = self.devices.records();
        children.push(self.vmm.child().record());
        record_children(&mut self.host, children)
    }
}

/// The guest is ready for containers.
pub struct AgentUp {
    pub(super) agent: Agent,
    pub(super) vm: VmUp,
}
