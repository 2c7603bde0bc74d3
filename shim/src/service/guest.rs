//! What the service needs of a pod: a guest that runs processes, and a host that starts guests.
//!
//! A border of the service's own, so that the protocols, the states and the events are tested over
//! real sockets with a guest whose processes are scripted. No call here is made with a lock held.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use async_trait::async_trait;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use oci_spec::runtime::Spec;

use crate::{
    agent::ProcessId,
    streams::{Ends, Streams},
};

/// What kind of answer a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestErrorKind {
    /// What was named is not there.
    NotFound,
    /// What was to be made is there.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// What was asked makes no sense.
    InvalidArgument,
    /// The guest does not answer, or is gone.
    Unavailable,
    /// Nobody can do that.
    Unimplemented,
    /// Anything else.
    Internal,
}

/// Why a guest or its host did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// The kind.
    pub kind: GuestErrorKind,
    /// The whole chain of causes, printable.
    pub message: String,
}

impl GuestError {
    /// An error of `kind`.
    #[must_use]
    pub fn new(kind: GuestErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// How a process in the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestEnd {
    /// Its exit code, or 128 and the signal's number.
    pub code: u8,
    /// The guest's out-of-memory killer struck in its container.
    pub out_of_memory: bool,
    /// When.
    pub at: SystemTime,
}

/// A container to be made in a guest.
#[derive(Debug)]
pub struct NewContainer {
    /// Its id, checked.
    pub id: String,
    /// Its specification, as containerd wrote it.
    pub spec: Spec,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Its root file system, mounted on the host.
    pub rootfs: PathBuf,
    /// Whether its init gets a terminal.
    pub terminal: bool,
    /// Whether its init gets a standard input.
    pub stdin: bool,
}

/// A process to be added to a container.
#[derive(Clone, Debug)]
pub struct NewProcess {
    /// The `process` object of an OCI runtime specification.
    pub json: Vec<u8>,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// Whether it gets a standard input.
    pub stdin: bool,
}

/// How names are resolved in a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of servers.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Options of resolv.conf.
    pub options: Vec<String>,
}

/// A sandbox to be started.
#[derive(Clone, Debug, Default)]
pub struct SandboxSettings {
    /// Its id.
    pub id: String,
    /// Its containerd namespace.
    pub namespace: String,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// The specification of its first container; none with the sandbox API.
    pub spec: Option<Spec>,
    /// Its annotations.
    pub annotations: HashMap<String, String>,
    /// Its network namespace on the host.
    pub netns: Option<PathBuf>,
    /// Its host name; empty if nobody said one.
    pub hostname: String,
    /// How it resolves names; empty where files of the containers say it.
    pub dns: Dns,
    /// Its kernel parameters.
    pub sysctls: BTreeMap<String, String>,
    /// The cgroup of the pod on the host.
    pub cgroup_parent: Option<String>,
}

/// Starts guests.
#[async_trait]
pub trait Host: Send + Sync + 'static {
    /// Starts the sandbox's guest and answers when it takes containers.
    async fn launch(&self, settings: SandboxSettings) -> Result<Arc<dyn Guest>, GuestError>;
}

/// A guest that runs.
#[async_trait]
pub trait Guest: Send + Sync + 'static {
    /// Makes a container and leaves its init before its execve.
    async fn create(&self, container: NewContainer) -> Result<(), GuestError>;
    /// Adds a process to a container, not started yet.
    async fn exec(&self, process: &ProcessId, new: NewProcess) -> Result<(), GuestError>;
    /// Connects a process's streams; before its start, so that nothing is lost.
    async fn connect(&self, process: &ProcessId, ends: Ends) -> Result<Streams, GuestError>;
    /// Lets a process execve; answers when it did.
    async fn start(&self, process: &ProcessId) -> Result<(), GuestError>;
    /// Sends a signal; with `all` to every process of the container.
    async fn signal(&self, process: &ProcessId, signal: i32, all: bool) -> Result<(), GuestError>;
    /// Waits for the end of a process.
    async fn wait(&self, process: &ProcessId) -> Result<GuestEnd, GuestError>;
    /// Tells a terminal its size.
    async fn resize(&self, process: &ProcessId, columns: u16, rows: u16) -> Result<(), GuestError>;
    /// Forgets an ended process, and with an init its container.
    async fn delete(&self, process: &ProcessId) -> Result<(), GuestError>;
    /// Stops a container's processes where they are.
    async fn pause(&self, container: &str) -> Result<(), GuestError>;
    /// Lets them go on.
    async fn resume(&self, container: &str) -> Result<(), GuestError>;
    /// Changes a container's limits: the `resources` object of an OCI specification.
    async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), GuestError>;
    /// What a container uses.
    async fn stats(&self, container: &str) -> Result<Metrics, GuestError>;
    /// The next container in which the out-of-memory killer struck; never if there is no more.
    async fn out_of_memory(&self) -> String;
    /// Resolves when the guest is lost, with the reason.
    async fn died(&self) -> String;
    /// A process of the host's that stands for the guest's; never 0.
    fn host_pid(&self) -> u32;
    /// Takes everything down.
    async fn stop(&self);
}
