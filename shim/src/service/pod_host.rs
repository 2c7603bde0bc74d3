//! The guest that the service asks is a pod.
//!
//! What the program needs beside it is found as `nacre` finds it: the other programs in its own
//! folder; kernel and initramfs in `/usr/share/nacre`, unless `NACRE_KERNEL` and `NACRE_INITRAMFS` say
//! otherwise; the sandboxes' state in `/run/nacre`, unless `NACRE_STATE` does. A shim inherits
//! containerd's environment.

use std::{env, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use tokio::sync::{
    Mutex,
    broadcast::{Receiver, error::RecvError},
};

use super::{
    guest::{
        Guest, GuestEnd, GuestError, GuestErrorKind, Host, NewContainer, NewProcess,
        SandboxSettings,
    },
    metrics,
};
use crate::{
    agent::ProcessId,
    error_chain, paths,
    pod::{self, ErrorKind, Pod, PodConfig, PodError},
    registry::Registry,
    size::ByteSize,
    streams::{Ends, Streams},
};

/// What a pod has beside what its containers are allowed.
const CPUS: u32 = 1;
const MEMORY: ByteSize = ByteSize(512 << 20);
/// How long a guest may boot without a sign of progress, and a call to the agent take.
const AGENT: Duration = Duration::from_secs(120);

/// Starts pods on this machine.
#[derive(Debug)]
pub struct PodHost {
    kernel: PathBuf,
    initramfs: PathBuf,
    log_level: log::LevelFilter,
}

impl PodHost {
    /// By the environment.
    #[must_use]
    pub fn from_environment(log_level: log::LevelFilter) -> Self {
        let path = |name, or: &str| env::var_os(name).map_or_else(|| or.into(), PathBuf::from);
        Self {
            kernel: path("NACRE_KERNEL", "/usr/share/nacre/vmlinux"),
            initramfs: path("NACRE_INITRAMFS", "/usr/share/nacre/initramfs"),
            log_level,
        }
    }

    fn config(&self, settings: SandboxSettings) -> Result<PodConfig, GuestError> {
        let failed = |error: String| GuestError::new(GuestErrorKind::Internal, error);
        let servers = settings.dns.servers.iter();
        let nameservers = servers
            .map(|server| server.parse::<IpAddr>().map_err(|error| (server, error)))
            .collect::<Result<_, _>>()
            .map_err(|(server, error)| {
                let what = format!("name server `{server}`: {error}");
                GuestError::new(GuestErrorKind::InvalidArgument, what)
            })?;
        Ok(PodConfig {
            id: settings.id,
            cpus: CPUS,
            max_cpus: None,
            memory: MEMORY,
            max_memory: None,
            netns: settings.netns,
            hostname: Some(settings.hostname).filter(|name| !name.is_empty()),
            nameservers,
            sysctls: settings.sysctls,
            programs: paths::own_folder().map_err(|error| failed(error.to_string()))?,
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            kernel_arguments: Vec::new(),
            registry: Registry::open(paths::state_root())
                .map_err(|error| failed(error_chain(&error)))?,
            log_level: self.log_level,
            agent_timeout: AGENT,
        })
    }
}

#[async_trait]
impl Host for PodHost {
    async fn launch(&self, settings: SandboxSettings) -> Result<Arc<dyn Guest>, GuestError> {
        let pod = Pod::start(self.config(settings)?).await?;
        let out_of_memory = Mutex::new(pod.out_of_memory());
        Ok(Arc::new(PodGuest { pod, out_of_memory }))
    }
}

struct PodGuest {
    pod: Pod,
    // One task takes from it at a time; a lock because the trait's calls share the guest.
    out_of_memory: Mutex<Receiver<String>>,
}

impl From<PodError> for GuestError {
    fn from(error: PodError) -> Self {
        let kind = match error.kind() {
            ErrorKind::NotFound => GuestErrorKind::NotFound,
            ErrorKind::AlreadyExists => GuestErrorKind::AlreadyExists,
            ErrorKind::FailedPrecondition => GuestErrorKind::FailedPrecondition,
            ErrorKind::InvalidArgument => GuestErrorKind::InvalidArgument,
            ErrorKind::Unavailable => GuestErrorKind::Unavailable,
            ErrorKind::Internal => GuestErrorKind::Internal,
        };
        Self::new(kind, error_chain(&error))
    }
}

#[async_trait]
impl Guest for PodGuest {
    async fn create(&self, container: NewContainer) -> Result<(), GuestError> {
        let NewContainer { id, spec, bundle: _, rootfs, terminal, stdin } = container;
        let new = pod::NewContainer { id, spec, rootfs, terminal, stdin };
        Ok(self.pod.create(new).await?)
    }

    async fn exec(&self, process: &ProcessId, new: NewProcess) -> Result<(), GuestError> {
        Ok(self.pod.exec(process, new.json, new.terminal, new.stdin).await?)
    }

    async fn connect(&self, process: &ProcessId, ends: Ends) -> Result<Streams, GuestError> {
        Ok(self.pod.connect_streams(process, ends).await?)
    }

    async fn start(&self, process: &ProcessId) -> Result<(), GuestError> {
        let guest_pid = self.pod.start_process(process).await?;
        log::debug!("{process:?} is the guest's process {guest_pid}");
        Ok(())
    }

    async fn signal(&self, process: &ProcessId, signal: i32, all: bool) -> Result<(), GuestError> {
        Ok(self.pod.signal(process, signal, all).await?)
    }

    async fn wait(&self, process: &ProcessId) -> Result<GuestEnd, GuestError> {
        let end = self.pod.wait(process).await?;
        Ok(GuestEnd { code: end.code, out_of_memory: end.out_of_memory, at: end.at })
    }

    async fn resize(&self, process: &ProcessId, columns: u16, rows: u16) -> Result<(), GuestError> {
        Ok(self.pod.resize(process, columns, rows).await?)
    }

    async fn delete(&self, process: &ProcessId) -> Result<(), GuestError> {
        Ok(self.pod.delete(process).await?)
    }

    async fn pause(&self, container: &str) -> Result<(), GuestError> {
        Ok(self.pod.pause(container).await?)
    }

    async fn resume(&self, container: &str) -> Result<(), GuestError> {
        Ok(self.pod.resume(container).await?)
    }

    async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), GuestError> {
        Ok(self.pod.update(container, resources).await?)
    }

    async fn stats(&self, container: &str) -> Result<Metrics, GuestError> {
        Ok(metrics::of(&self.pod.stats(container).await?))
    }

    async fn out_of_memory(&self) -> String {
        let mut receiver = self.out_of_memory.lock().await;
        loop {
            match receiver.recv().await {
                Ok(container) => return container,
                Err(RecvError::Lagged(lost)) => log::warn!("{lost} notices were lost"),
                Err(RecvError::Closed) => return std::future::pending().await,
            }
        }
    }

    async fn died(&self) -> String {
        self.pod.died().await.reason
    }

    fn host_pid(&self) -> u32 {
        self.pod.vmm_pid()
    }

    async fn stop(&self) {
        self.pod.stop().await;
    }
}
