//! What a sandbox will be, decided before anything exists. Pure: from a [`SandboxConfig`] and
//! [`HostFacts`] to a [`SandboxPlan`] or an error; [`inputs`] alone looks at files.
//!
//! In the guest, everything shared is mounted below `/run/nacre`: the root file system at `rootfs`
//! (an overlay above `lower`, unless it is to be written), the volume number N at `volumes/N`. Disk
//! number N has the serial `disk-N` and appears in the container as `/dev/disk-N`.

mod error;
pub mod inputs;
pub mod process;
mod size;
pub mod spec;

use std::{collections::BTreeMap, net::Ipv4Addr, path::PathBuf};

use nacre_proto::agent::{Device, Storage};
use oci_spec::runtime::Spec;

use crate::{cgroup::HostLimits, name::SandboxName, passthrough::Function, size::ByteSize};
pub use error::PlanError;
use inputs::HostFacts;
use process::ProcessConfig;

/// Where the agent mounts what is shared with the guest.
const GUEST: &str = "/run/nacre";
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

/// All that a front end can ask for.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// Its name; also the container's id.
    pub name: SandboxName,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initial file system, with the agent.
    pub initramfs: PathBuf,
    /// Added to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// Whether the guest's kernel is to tell more.
    pub verbose_kernel: bool,
    /// The container's root file system.
    pub rootfs: PathBuf,
    /// Whether the container writes to it, instead of to memory.
    pub writable_rootfs: bool,
    /// How many processors the guest has.
    pub cpus: u32,
    /// How many it can be given; as many as the host has unless told otherwise.
    pub max_cpus: Option<u32>,
    /// How much memory the guest has.
    pub memory: ByteSize,
    /// How much it can be given; as much as the host has unless told otherwise.
    pub max_memory: Option<ByteSize>,
    /// Shared folders.
    pub volumes: Vec<Volume>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Devices of the host's that the guest is given as they are.
    pub passthrough: Vec<Function>,
    /// Whether there is a network.
    pub network: bool,
    /// The name that the guest and the container have for themselves.
    pub hostname: Option<String>,
    /// The container's program.
    pub process: ProcessConfig,
    /// Limits in the guest.
    pub limits: ContainerLimits,
    /// Limits on the host.
    pub host_limits: HostLimits,
}

/// A device of the guest, and so one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DevicePlan {
    /// `nacre-vsock`.
    Vsock {
        /// The guest's address; each VM has its own socket, so the number need not be unique.
        cid: u32,
    },
    /// `nacre-fs`.
    Share {
        /// The tag, also the device's id.
        tag: String,
        /// The folder.
        path: PathBuf,
        /// Whether the guest may only read it.
        read_only: bool,
        /// Where the container sees it; none: it is below the container's root.
        place: Option<PathBuf>,
    },
    /// `nacre-blk`.
    Disk {
        /// The serial, also the device's id.
        serial: String,
        /// The image.
        path: PathBuf,
        /// Whether it may only be read.
        read_only: bool,
    },
    /// `nacre-net`.
    Network {
        /// The device's id.
        id: String,
        /// What the guest calls it.
        interface: String,
    },
}

impl DevicePlan {
    /// The network interface number `index`.
    #[must_use]
    pub fn nic(index: usize) -> Self {
        let id = if index == 0 { "net".to_owned() } else { format!("net-{index}") };
        Self::Network { id, interface: format!("eth{index}") }
    }

    /// The device's id for the VMM and for messages.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Vsock { .. } => "vsock",
            Self::Share { tag, .. } => tag,
            Self::Disk { serial, .. } => serial,
            Self::Network { id, .. } => id,
        }
    }
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
    /// What the agent mounts before the container is made, in order.
    pub storages: Vec<Storage>,
    /// Which disks become device nodes of the container.
    pub container_devices: Vec<Device>,
    /// The name servers for the guest.
    pub nameservers: Vec<Ipv4Addr>,
    /// The guest's own name.
    pub hostname: String,
    /// The container.
    pub spec: Spec,
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
        for volume in &config.volumes {
            absolute("volume", &volume.guest)?;
            if volume.guest.parent().is_none() {
                return Err(PlanError::VolumeOnRoot);
            }
        }
        let hostname = hostname(&config)?;
        let nameservers = if config.network { facts.nameservers.clone() } else { Vec::new() };
        let spec = spec::build(&config, facts, &hostname, !nameservers.is_empty())?;
        Ok(Self {
            max_cpus: size::max_cpus(&config, facts)?,
            max_memory: size::max_memory(&config, facts)?,
            command_line: command_line(&config)?,
            devices: devices(&config),
            storages: storages(&config),
            container_devices: container_devices(&config.disks),
            nameservers,
            hostname,
            spec,
            config,
        })
    }
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

fn devices(config: &SandboxConfig) -> Vec<DevicePlan> {
    let rootfs = DevicePlan::Share {
        tag: "rootfs".to_owned(),
        path: config.rootfs.clone(),
        read_only: !config.writable_rootfs,
        place: None,
    };
    let volumes = config.volumes.iter().enumerate().map(|(index, volume)| DevicePlan::Share {
        tag: format!("volume-{index}"),
        path: volume.host.clone(),
        read_only: volume.read_only,
        place: Some(volume.guest.clone()),
    });
    let disks = config.disks.iter().enumerate().map(|(index, disk)| DevicePlan::Disk {
        serial: format!("disk-{index}"),
        path: disk.path.clone(),
        read_only: disk.read_only,
    });
    [DevicePlan::Vsock { cid: 3 }, rootfs]
        .into_iter()
        .chain(volumes)
        .chain(disks)
        .chain(config.network.then(|| DevicePlan::nic(0)))
        .collect()
}

/// Where a volume is mounted in the guest.
pub(crate) fn mount_point(tag: &str) -> String {
    format!("{GUEST}/volumes/{}", tag.strip_prefix("volume-").unwrap_or(tag))
}

fn storages(config: &SandboxConfig) -> Vec<Storage> {
    let share = |tag: String, mount_point: String, read_only: bool| Storage {
        driver: "virtiofs".to_owned(),
        source: tag,
        options: if read_only { vec!["ro".to_owned()] } else { Vec::new() },
        mount_point,
        ..Storage::default()
    };
    let lower = format!("{GUEST}/lower");
    let rootfs = format!("{GUEST}/rootfs");
    let mut storages = if config.writable_rootfs {
        vec![share("rootfs".to_owned(), rootfs, false)]
    } else {
        let overlay = Storage {
            driver: "overlay".to_owned(),
            source: lower.clone(),
            mount_point: rootfs,
            ..Storage::default()
        };
        vec![share("rootfs".to_owned(), lower, true), overlay]
    };
    storages.extend(config.volumes.iter().enumerate().map(|(index, volume)| {
        let tag = format!("volume-{index}");
        let mount_point = mount_point(&tag);
        share(tag, mount_point, volume.read_only)
    }));
    storages
}

fn container_devices(disks: &[Disk]) -> Vec<Device> {
    let device = |(index, disk): (usize, &Disk)| Device {
        serial: format!("disk-{index}"),
        container_path: format!("/dev/disk-{index}"),
        read_only: disk.read_only,
        ..Device::default()
    };
    disks.iter().enumerate().map(device).collect()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(crate) mod tests;
