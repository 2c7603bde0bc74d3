//! From what a pod is to be to one that runs.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::{Mutex, broadcast, mpsc, watch};

use crate::{
    cgroup::HostLimits,
    name::SandboxName,
    network::namespace::Namespace,
    plan::{Contents, NetworkConfig, SandboxConfig, SandboxPlan, inputs, inputs::HostFacts},
    pod::{Pod, PodConfig, PodError, Shared, events, owner::own, share::Share, sizing::Size},
    sandbox::{Planned, SandboxError, Settings, Ways},
    timing::Timeline,
};

/// How many containers may have been out of memory before somebody looks.
const EVENTS: usize = 64;

pub(super) async fn start(config: PodConfig) -> Result<Pod, PodError> {
    let name: SandboxName = config.id.parse()?;
    let base = Size { cpus: config.cpus, memory_bytes: config.memory.0 };
    let files = config.registry.files(&name);
    let settings = Settings {
        programs: config.programs.clone(),
        registry: config.registry.clone(),
        log_level: config.log_level,
        agent_timeout: config.agent_timeout,
        keep: false,
        measure: false,
    };
    let plan = plan(config, name.clone())?;
    let planned = Planned::new(plan, settings, Timeline::start());
    let claimed = planned.claim()?;
    let share = Share::make(files.shared())?;
    let create = async {
        let vm = claimed.spawn_backends().await?.start_vmm()?;
        vm.connect_agent().await?.hold()
    };
    let (held, ways): (_, Ways) = create.await?;
    let most = ways.operator.resources().await.map_err(PodError::Refused)?;
    let most = Size { cpus: most.max_cpus, memory_bytes: most.max_memory_bytes };
    let (stops, asked) = mpsc::channel(1);
    let (dead, death) = watch::channel(None);
    tokio::spawn(own(held, ways.agent.clone(), asked, dead));
    let (out_of_memory, _) = broadcast::channel(EVENTS);
    let shared = Shared {
        id: name.to_string(),
        ways,
        share,
        sizes: (base, most),
        resizing: Mutex::new(()),
        containers: std::sync::Mutex::new(BTreeMap::new()),
        stops,
        death,
        out_of_memory,
    };
    let pod = Pod { shared: Arc::new(shared) };
    tokio::spawn(events::listen(Arc::downgrade(&pod.shared)));
    Ok(pod)
}

/// What the sandbox is to be; looks at the host.
fn plan(config: PodConfig, name: SandboxName) -> Result<SandboxPlan, PodError> {
    let network = match &config.netns {
        None => NetworkConfig::None,
        Some(path) => {
            let look = Namespace::open(path).and_then(|namespace| namespace.look());
            let found = look.map_err(SandboxError::from)?;
            NetworkConfig::Namespace { path: path.clone(), found }
        }
    };
    let shared = config.registry.files(&name).shared();
    let config = SandboxConfig {
        name,
        kernel: config.kernel,
        initramfs: config.initramfs,
        kernel_arguments: config.kernel_arguments,
        verbose_kernel: false,
        cpus: config.cpus,
        max_cpus: config.max_cpus,
        memory: config.memory,
        max_memory: config.max_memory,
        passthrough: Vec::new(),
        network,
        hostname: config.hostname,
        host_limits: HostLimits::default(),
        sysctls: config.sysctls,
        contents: Contents::Pod { shared, nameservers: config.nameservers },
    };
    inputs::check(&config)?;
    Ok(SandboxPlan::new(config, &HostFacts::gather(None)?)?)
}
