//! A pod: a sandbox that comes up without a container and then has any number of them.
//!
//! This is what a task of the containerd shim owns. A [`PodConfig`] says what the virtual machine is
//! to be, a [`NewContainer`] what runs in it. It knows nothing of containerd: no sockets, no events,
//! no names of files but those that it is given.

//!
//! The processes of a pod die with the thread that started them, so a pod has to be started, and its
//! runtime driven, by threads that last as long as it does.

mod container;
mod error;
mod events;
mod owner;
mod process;
mod release;
mod share;
mod sizing;
mod spec;
mod start;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use oci_spec::runtime::Spec;
use tokio::{
    sync::{self, broadcast, mpsc, oneshot, watch},
    time::timeout,
};

pub use error::{ErrorKind, PodError};
pub use owner::Death;
pub use share::ShareError;
pub use spec::SpecError;

use crate::{registry::Registry, sandbox::Ways, size::ByteSize};
use container::Container;
use owner::Stop;
use share::Share;
use sizing::Size;

/// How long to wait for the death that explains a broken connection.
const EXPLANATION: Duration = Duration::from_secs(2);

/// What a pod is to be.
#[derive(Clone, Debug)]
pub struct PodConfig {
    /// Its id, which is also its name in the registry.
    pub id: String,
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
    /// The guest's own name; the id unless it is given.
    pub hostname: Option<String>,
    /// The guest's own name servers. Containers have what their mounts bring.
    pub nameservers: Vec<IpAddr>,
    /// Set in the guest as a whole.
    pub sysctls: BTreeMap<String, String>,
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

/// A pod that runs: a handle, to be copied freely. When the last one is dropped, the pod is ended by
/// force.
#[derive(Clone)]
pub struct Pod {
    shared: Arc<Shared>,
}

/// What all handles have.
struct Shared {
    id: String,
    ways: Ways,
    share: Share,
    /// Without a container, and at most.
    sizes: (Size, Size),
    /// Held while the guest's size is decided on and changed.
    resizing: sync::Mutex<()>,
    /// By their ids. Locked for map operations only.
    containers: Mutex<BTreeMap<String, Container>>,
    stops: mpsc::Sender<Stop>,
    death: watch::Receiver<Option<Death>>,
    out_of_memory: broadcast::Sender<String>,
}

impl Pod {
    /// Boots a pod. Nothing is left if that fails, or if the future is dropped.
    ///
    /// # Errors
    ///
    /// Fails if the host can't have it, or the guest does not come up.
    pub async fn start(config: PodConfig) -> Result<Self, PodError> {
        start::start(config).await
    }

    /// Resolves when the pod is no more, with the reason.
    pub async fn died(&self) -> Death {
        self.shared.died().await
    }

    /// The ids of containers that were out of memory, from now on, as the guest tells it.
    #[must_use]
    pub fn out_of_memory(&self) -> broadcast::Receiver<String> {
        self.shared.out_of_memory.subscribe()
    }

    /// The VMM's process.
    #[must_use]
    pub fn vmm_pid(&self) -> u32 {
        self.shared.ways.vmm_pid
    }

    /// Lets the guest write back what it has, powers it off, and takes everything down. Containers
    /// that still run are ended by that. It is no error if the pod has died before.
    pub async fn stop(&self) {
        let (answer, answered) = oneshot::channel();
        if self.shared.stops.send(answer).await.is_err() || answered.await.is_err() {
            log::debug!("the pod had ended already");
        }
    }
}

impl Shared {
    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Container>> {
        // Map operations don't panic half-way, so a poisoned lock has a sound map in it.
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn died(&self) -> Death {
        let mut death = self.death.clone();
        let told = death.wait_for(Option::is_some).await.map(|told| told.clone());
        // A task that is gone without a word was taken down with its runtime.
        let gone = || Death {
            reason: "its supervisor is gone".to_owned(),
            was_stopped: false,
            at: SystemTime::now(),
        };
        told.ok().flatten().unwrap_or_else(gone)
    }

    fn is_out_of_memory(&self, container: String) {
        // What the guest makes up is nobody's.
        if self.containers().contains_key(&container) && self.out_of_memory.send(container).is_err()
        {
            log::debug!("nobody wants to know of it");
        }
    }

    /// Waits for `work` and for the pod's death, which explains a broken connection.
    async fn guarded<T, E: Into<PodError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, PodError> {
        let error = tokio::select! {
            biased;
            done = work => match done {
                Ok(done) => return Ok(done),
                Err(error) => error.into(),
            },
            death = self.died() => return Err(PodError::Ended(death.reason)),
        };
        if error.kind() == ErrorKind::Unavailable
            && let Ok(death) = timeout(EXPLANATION, self.died()).await
        {
            return Err(PodError::Ended(death.reason));
        }
        Err(error)
    }
}

/// Resolves when there is no pod any more.
async fn ended(mut death: watch::Receiver<Option<Death>>) {
    if death.wait_for(Option::is_some).await.is_err() {
        log::debug!("the pod's owner is gone");
    }
}
