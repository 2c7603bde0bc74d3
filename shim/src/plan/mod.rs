//! What a sandbox will be, decided before anything exists. Pure: from a [`SandboxConfig`] and
//! [`HostFacts`] to a [`SandboxPlan`] or an error; [`inputs`] alone looks at files.
//!
//! In the guest, everything shared is mounted below `/run/nacre`: the root file system at `rootfs`
//! (an overlay above `lower`, unless it is to be written), the volume number N at `volumes/N`. Disk
//! number N has the serial `disk-N` and appears in the container as `/dev/disk-N`.

mod devices;
mod error;
pub mod inputs;
pub mod process;
mod size;
pub mod spec;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use nacre_proto::agent::{Device, Storage};
use oci_spec::runtime::Spec;

use crate::{
    cgroup::HostLimits, name::SandboxName, network::namespace::Found, passthrough::Function,
    size::ByteSize,
};
pub use devices::DevicePlan;
pub(crate) use devices::{guest_pod, mount_point, nic_id};
pub use error::PlanError;
use inputs::HostFacts;
use process::ProcessConfig;

/// Where the agent mounts what is shared with the guest.
const GUEST: &str = "/run/nacre";
/// The tag of a pod's share, and where it is mounted below that.
pub(crate) const POD: &str = "pod";
/// Where the memory is mounted in the guest that a pod's containers share.
pub(crate) const POD_MEMORY: &str = "/run/nacre/shm";
/// What the guest's kernel is told, unless more is asked for.
///
/// `panic=-1` reboots at once, which the VMM reports; the time source is known to be good, so it is
/// not probed; nothing looks for devices that are not there; memory that is added can be taken away
/// again as far as the kernel can do with the rest; mitigations stay on.
const COMMAND_LINE: [&str; 10] = [
    "console=ttyS0",
    "panic=-1",
    "tsc=reliable",
    "no_timer_check",
    "rcupdate.rcu_expedited=1",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    "pci=lastbus=0",
    "8250.nr_uarts=1",
    "memory_hotplug.online_policy=auto-movable",
];
/// The longest command line, in bytes (COMMAND_LINE_SIZE of x86).
const COMMAND_LINE_BYTES: usize = 2047;

/// A folder of the host that the container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host; absolute.
    pub host: PathBuf,
    /// In the container; absolute.
    pub guest: PathBuf,
    /// Whether the container may only read it.
    pub read_only: bool,
}

/// A disk image of the host that the container sees as a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// On the host; absolute.
    pub path: PathBuf,
    /// Whether it may only be read.
    pub read_only: bool,
}

/// What the guest's kernel holds the container to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContainerLimits {
    /// `memory.max` of the container's cgroup in the guest.
    pub memory: Option<ByteSize>,
    /// `pids.max` of the container's cgroup in the guest.
    pub pids: Option<u32>,
}

/// The container of a sandbox that has exactly one.
#[derive(Clone, Debug)]
pub struct ContainerConfig {
    /// Its root file system.
    pub rootfs: PathBuf,
    /// Whether it writes to that, instead of to memory.
    pub writable_rootfs: bool,
    /// Shared folders.
    pub volumes: Vec<Volume>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Its program.
    pub process: ProcessConfig,
    /// Limits in the guest.
    pub limits: ContainerLimits,
}

/// What runs in a sandbox.
#[derive(Clone, Debug)]
pub enum Contents {
    /// One container, from the beginning to the end.
    Container(Box<ContainerConfig>),
    /// Containers that come and go; what they have of the host's files is in this folder.
    Pod {
        /// The folder.
        shared: PathBuf,
        /// The guest's own name servers.
        nameservers: Vec<IpAddr>,
    },
}

/// How a guest reaches others.
#[derive(Clone, Debug, PartialEq)]
pub enum NetworkConfig {
    /// Not at all.
    None,
    /// By a network of the sandbox's own, which is made for it.
    Own,
    /// By the interfaces of a network namespace that somebody else made.
    Namespace {
        /// Where it is mounted.
        path: PathBuf,
        /// What is in it.
        found: Found,
    },
}

/// All that a front end can ask for.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// Its name; also the id of its container, if it has one from the beginning.
    pub name: SandboxName,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initial file system, with the agent.
    pub initramfs: PathBuf,
    /// Added to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// Whether the guest's kernel is to tell more.
    pub verbose_kernel: bool,
    /// How many processors the guest has.
    pub cpus: u32,
    /// How many it can be given; as many as the host has unless told otherwise.
    pub max_cpus: Option<u32>,
    /// How much memory the guest has.
    pub memory: ByteSize,
    /// How much it can be given; as much as the host has unless told otherwise.
    pub max_memory: Option<ByteSize>,
    /// Devices of the host's that the guest is given as they are.
    pub passthrough: Vec<Function>,
    /// Its network.
    pub network: NetworkConfig,
    /// The name that the guest, and its container, have for themselves.
    pub hostname: Option<String>,
    /// Set in the guest as a whole.
    pub sysctls: BTreeMap<String, String>,
    /// What runs in it.
    pub contents: Contents,
    /// Limits on the host.
    pub host_limits: HostLimits,
}

/// The id of the passthrough device number `index`.
#[must_use]
pub fn passthrough_id(index: usize) -> String {
    format!("vfio-{index}")
}

/// A sandbox that can be made.
#[derive(Clone, Debug)]
pub struct SandboxPlan {
    /// What was asked for.
    pub config: SandboxConfig,
    /// How many processors the guest can be given.
    pub max_cpus: u32,
    /// How much memory the guest can be given.
    pub max_memory: ByteSize,
    /// What the guest's kernel is told.
    pub command_line: String,
    /// The guest's devices.
    pub devices: Vec<DevicePlan>,
    /// What the agent mounts before any container is made, in order.
    pub storages: Vec<Storage>,
    /// The name servers for the guest.
    pub nameservers: Vec<IpAddr>,
    /// The guest's own name.
    pub hostname: String,
    /// The container, if there is one from the beginning.
    pub container: Option<ContainerPlan>,
}

/// A container that can be made.
#[derive(Clone, Debug)]
pub struct ContainerPlan {
    /// Its specification.
    pub spec: Spec,
    /// Which disks become device nodes of it.
    pub devices: Vec<Device>,
}

impl SandboxPlan {
    /// The host's devices that the guest begins with, by their ids.
    #[must_use]
    pub fn functions(&self) -> BTreeMap<String, Function> {
        let given = self.config.passthrough.iter().enumerate();
        given.map(|(index, function)| (passthrough_id(index), function.clone())).collect()
    }

    /// Decides.
    ///
    /// # Errors
    ///
    /// Fails if what is asked for makes no sense on this host.
    pub fn new(config: SandboxConfig, facts: &HostFacts) -> Result<Self, PlanError> {
        size::check(&config, facts)?;
        let hostname = hostname(&config)?;
        let nameservers = match (&config.contents, &config.network) {
            (Contents::Pod { nameservers, .. }, _) => nameservers.clone(),
            (Contents::Container(_), NetworkConfig::None) => Vec::new(),
            (Contents::Container(_), _) => {
                facts.nameservers.iter().copied().map(IpAddr::V4).collect()
            }
        };
        let container = match &config.contents {
            Contents::Pod { .. } => None,
            Contents::Container(container) => {
                check_volumes(&container.volumes)?;
                let identity = (&config.name, &*hostname);
                let resolver = !nameservers.is_empty();
                let spec = spec::build(container, identity, facts, resolver)?;
                Some(ContainerPlan { spec, devices: devices::container_devices(&container.disks) })
            }
        };
        Ok(Self {
            max_cpus: size::max_cpus(&config, facts)?,
            max_memory: size::max_memory(&config, facts)?,
            command_line: command_line(&config)?,
            devices: devices::devices(&config),
            storages: devices::storages(&config.contents),
            nameservers,
            hostname,
            container,
            config,
        })
    }
}

fn check_volumes(volumes: &[Volume]) -> Result<(), PlanError> {
    for volume in volumes {
        absolute("volume", &volume.guest)?;
        if volume.guest.parent().is_none() {
            return Err(PlanError::VolumeOnRoot);
        }
    }
    Ok(())
}

fn absolute(what: &'static str, path: &std::path::Path) -> Result<(), PlanError> {
    if path.is_absolute() {
        Ok(())
    } else {
        Err(PlanError::NotAbsolute { what, path: path.to_owned() })
    }
}

fn hostname(config: &SandboxConfig) -> Result<String, PlanError> {
    let name = config.hostname.clone().unwrap_or_else(|| config.name.to_string());
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.is_empty() && name.len() <= 64 && name.chars().all(fits) {
        Ok(name)
    } else {
        Err(PlanError::Hostname(name))
    }
}

fn command_line(config: &SandboxConfig) -> Result<String, PlanError> {
    let mut words: Vec<&str> = COMMAND_LINE.to_vec();
    if !config.verbose_kernel {
        words.push("quiet");
    }
    words.extend(config.kernel_arguments.iter().map(String::as_str));
    let line = words.join(" ");
    if line.contains('\0') {
        return Err(PlanError::Nul("the kernel's command line"));
    }
    if line.len() <= COMMAND_LINE_BYTES {
        Ok(line)
    } else {
        Err(PlanError::CommandLine(line.len()))
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(crate) mod tests;
