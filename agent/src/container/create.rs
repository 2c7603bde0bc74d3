//! Making a container: its disks, its control group, its bundle, its init up to the execve.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde::Serialize;
use tokio::task::spawn_blocking;

use crate::{
    cgroup::Cgroup,
    container::{
        CONTAINERS_MAX, Container, ContainerError, Containers, Slot, init_of,
        memory::Killings,
        namespaces::NamespaceRequest,
        of, record_end,
        spec::{Amended, DiskNode, amend},
    },
    devices::function::{self, FunctionRequest},
    ids::ContainerId,
    launch::{
        BUNDLES, CAPABILITIES_SUFFIX, Kind, LIBCONTAINER_STATE, Order,
        spawn::{Launch, LaunchError},
    },
    mounts::unmount_below,
    process::{
        Process,
        stdio::{Inherited, Owner, Wiring},
    },
    sandbox::{
        disks::{self, DiskRequest},
        storage::{self, StoragePlan},
    },
    text::chain,
};

/// What the host asks for.
#[derive(Debug)]
pub(crate) struct NewContainer {
    /// Its name.
    pub(crate) id: ContainerId,
    /// The OCI specification, unread.
    pub(crate) oci_spec: Vec<u8>,
    /// Its init's streams.
    pub(crate) wiring: Wiring,
    /// Disks to be device nodes.
    pub(crate) disks: Vec<DiskRequest>,
    /// Devices of the host's.
    pub(crate) functions: Vec<FunctionRequest>,
    /// What is mounted for it alone.
    pub(crate) storages: Vec<StoragePlan>,
    /// Namespaces that it does not get of its own.
    pub(crate) namespaces: Vec<NamespaceRequest>,
}

/// A name that is taken but not in use yet; given back when dropped.
struct Reserved<'a> {
    containers: &'a Containers,
    id: &'a ContainerId,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut slots = self.containers.slots();
        if matches!(slots.by_id.get(self.id), Some(Slot::Busy)) {
            slots.by_id.remove(self.id);
        }
    }
}

impl Containers {
    /// Makes a container and its init, which waits before its execve; gives the init's number.
    pub(crate) async fn create(&self, new: NewContainer) -> Result<u32, ContainerError> {
        let reserved = self.reserve(&new.id)?;
        let mut nodes = disks::nodes(&new.disks).await?;
        nodes.extend(function::nodes(&new.functions).await?);
        let terminal = new.wiring == Wiring::Terminal;
        // Held open until the init is in them.
        let shared = self.shared(&new.namespaces)?;
        let group = Cgroup::spec_path(&new.id);
        let amended = amend(&new.oci_spec, group, &nodes, &shared, terminal)?;
        let made = self.make(&new, amended, &nodes).await;
        let container = match made {
            Ok(container) => container,
            Err(error) => {
                remove_traces(&new.id).await;
                return Err(error);
            }
        };
        let pid = container.init.live().map_or(0, |live| live.pid.as_raw_nonzero().get());
        self.slots().by_id.insert(new.id.clone(), Slot::Here(Arc::new(container)));
        drop(reserved);
        Ok(u32::try_from(pid).unwrap_or(0))
    }

    fn reserve<'a>(&'a self, id: &'a ContainerId) -> Result<Reserved<'a>, ContainerError> {
        let mut slots = self.slots();
        if slots.closed {
            return Err(ContainerError::ShuttingDown);
        }
        if slots.by_id.contains_key(id) {
            return Err(ContainerError::Exists(init_of(id)));
        }
        if slots.by_id.len() >= CONTAINERS_MAX {
            return Err(ContainerError::TooMany { what: "containers", max: CONTAINERS_MAX });
        }
        slots.by_id.insert(id.clone(), Slot::Busy);
        Ok(Reserved { containers: self, id })
    }

    async fn make(
        &self,
        new: &NewContainer,
        amended: Amended,
        nodes: &[DiskNode],
    ) -> Result<Container, ContainerError> {
        for storage in &new.storages {
            storage.mount().await?;
        }
        for node in nodes.iter().filter(|node| node.read_only) {
            disks::set_read_only(node)?;
        }
        let cgroup = Arc::new(Cgroup::make(&new.id)?);
        cgroup.set(&amended.limits)?;
        cgroup.rule_devices(&amended.devices)?;
        let events = Arc::clone(&self.events);
        let killings = Arc::new(Killings::new(new.id.clone(), Arc::clone(&cgroup), events));
        let watch = killings.watch().map_err(ContainerError::Watch)?;
        let bundle = write_bundle(&new.id, &amended)?;
        let owner = owner(&amended);
        let program = program(&amended);
        let (init, inherited) =
            Process::new(init_of(&new.id), new.wiring, owner).map_err(ContainerError::Streams)?;
        let init = Arc::new(init);
        let launch = self.launch(&init, &killings, inherited, &program).await?;
        Ok(Container {
            bundle,
            cgroup,
            killings,
            _watch: watch,
            base: amended.process,
            filtered: amended.spec.linux().as_ref().is_some_and(|linux| linux.seccomp().is_some()),
            init,
            launch,
            program,
            added: Mutex::default(),
        })
    }

    async fn launch(
        &self,
        init: &Arc<Process>,
        killings: &Arc<Killings>,
        inherited: Inherited,
        program: &str,
    ) -> Result<Launch, ContainerError> {
        let failed =
            |source: LaunchError| ContainerError::Launch { what: program.to_owned(), source };
        let order = Order {
            container_id: init.id.container.to_string(),
            kind: Kind::Create,
            terminal: init.has_terminal(),
            size: None,
        };
        let launching = self.reaper.launching();
        let launch = Launch::order(&launching, &order, inherited).map_err(failed)?;
        let (pid, terminal) = launch.made().await.map_err(failed)?;
        let (live, end) = launching.follow(pid)?;
        if let Some(live) = live {
            init.set_waiting(live);
        }
        record_end(Arc::clone(init), Arc::clone(killings), end);
        if let Some(terminal) = terminal {
            init.set_terminal(terminal).map_err(of(&init.id))?;
        }
        Ok(launch)
    }
}

/// The user that the init runs as.
fn owner(amended: &Amended) -> Owner {
    let user = amended.spec.process().as_ref().map(|process| process.user().clone());
    user.map_or(Owner { uid: 0, gid: 0 }, |user| Owner { uid: user.uid(), gid: user.gid() })
}

/// The init's program, for messages.
fn program(amended: &Amended) -> String {
    let args = amended.spec.process().as_ref().and_then(|process| process.args().clone());
    args.and_then(|args| args.into_iter().next()).unwrap_or_default()
}

fn write_bundle(id: &ContainerId, amended: &Amended) -> Result<PathBuf, ContainerError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ContainerError::File { path, source }
    };
    let bundle = Path::new(BUNDLES).join(id);
    let state = Path::new(LIBCONTAINER_STATE);
    fs::create_dir_all(&bundle).map_err(failed(&bundle))?;
    fs::create_dir_all(state).map_err(failed(state))?;
    write_json(&bundle, "config.json", &amended.spec)?;
    if let Some(capabilities) = &amended.capabilities_after {
        write_json(&bundle, &format!("config.json{CAPABILITIES_SUFFIX}"), capabilities)?;
    }
    Ok(bundle)
}

/// Writes a file that a launch reads.
pub(super) fn write_json(
    bundle: &Path,
    name: &str,
    value: &impl Serialize,
) -> Result<(), ContainerError> {
    let path = bundle.join(name);
    serde_json::to_vec(value)
        .map_err(Into::into)
        .and_then(|json| fs::write(&path, json))
        .map_err(|source| ContainerError::File { path, source })
}

/// Removes what a container has besides its slot: processes, control group, files.
pub(super) async fn remove_traces(id: &ContainerId) {
    match Cgroup::make(id) {
        Ok(cgroup) => {
            if let Err(error) = cgroup.remove().await {
                log::error!("{}", chain(&error));
            }
        }
        Err(error) => log::error!("{}", chain(&error)),
    }
    for parent in [BUNDLES, LIBCONTAINER_STATE] {
        let path = Path::new(parent).join(id);
        if path.exists()
            && let Err(error) = fs::remove_dir_all(&path)
        {
            log::error!("can't remove {}: {error}", path.display());
        }
    }
    for folder in storage::folders(id) {
        // To write a file system back may take its time.
        let unmounted = spawn_blocking(move || unmount_below(&folder)).await;
        if let Err(error) = unmounted.unwrap_or_else(|error| Err(error.into())) {
            log::error!("can't unmount the storages of {id}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::lock;
    use crate::process::reap::Reaper;

    #[test]
    fn a_name_is_taken_once_and_given_back() {
        let containers = Containers::new(Arc::new(Reaper::default()));
        let id = ContainerId::parse("c").unwrap();
        let first = containers.reserve(&id).unwrap();
        assert!(matches!(containers.reserve(&id), Err(ContainerError::Exists(_))));
        assert!(matches!(containers.container(&id), Err(ContainerError::Busy(_))));
        drop(first);
        drop(containers.reserve(&id).unwrap());
        assert!(containers.close().is_empty());
        assert!(matches!(containers.reserve(&id), Err(ContainerError::ShuttingDown)));
        assert!(lock(&containers.slots).by_id.is_empty());
    }
}
