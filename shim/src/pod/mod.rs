//! A pod: a sandbox that comes up without a container and then has any number of them.
//!
//! This is what a task of the containerd shim owns. A [`PodConfig`] says what the virtual machine is
//! to be, a [`NewContainer`] what runs in it. It knows nothing of containerd: no sockets, no events,
//! no names of files but those that it is given.

mod error;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use oci_spec::runtime::Spec;

pub use error::{ErrorKind, PodError};

use crate::{registry::Registry, size::ByteSize};

/// What a pod is to be.
#[derive(Clone, Debug)]
pub struct PodConfig {
    /// Its id, which is also its name in the registry.
    pub id: String,
    /// containerd's namespace, for messages.
    pub namespace: String,
    /// How many processors it has without a container that asks for some.
    pub cpus: u32,
    /// How many it can be given; as many as the host has unless told otherwise.
    pub max_cpus: Option<u32>,
    /// How much memory it has beside what its containers are allowed.
    pub memory: ByteSize,
    /// How much it can be given; as much as the host has unless told otherwise.
    pub max_memory: Option<ByteSize>,
    /// The network namespace whose interfaces the guest gets; none: no network.
    pub netns: Option<PathBuf>,
    /// As the pod has them.
    pub annotations: BTreeMap<String, String>,
    /// The guest's own name; the id, cut to what the kernel takes, unless it is given.
    pub hostname: Option<String>,
    /// The guest's own name servers. Containers have what their mounts bring.
    pub nameservers: Vec<IpAddr>,
    /// Set in the guest as a whole.
    pub sysctls: BTreeMap<String, String>,
    /// The cgroup (v2, a path below its mount) below which the pod's processes get one of their own.
    pub cgroup_parent: Option<PathBuf>,
    /// Where the other programs are.
    pub programs: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initial file system, with the agent.
    pub initramfs: PathBuf,
    /// Added to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// Where the pod is registered.
    pub registry: Registry,
    /// How much the processes are to log.
    pub log_level: log::LevelFilter,
    /// How long the guest may boot without a sign of progress, and a call to the agent take.
    pub agent_timeout: Duration,
}

/// What a container is to be.
#[derive(Clone, Debug)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// The bundle's specification, as containerd wrote it for the host.
    pub spec: Spec,
    /// Its root file system, mounted on the host.
    pub rootfs: PathBuf,
    /// Whether its first process has a terminal.
    pub terminal: bool,
    /// Whether its first process gets a standard input.
    pub stdin: bool,
}
