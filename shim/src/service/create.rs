//! Making containers: the first one brings the guest up, the others join.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
};
use oci_spec::runtime::Spec;

use super::{
    Service, bundle,
    error::ServiceError,
    events::Event,
    guest::{Guest, NewContainer, SandboxSettings},
    ledger::{Container, Sandbox},
    mounts,
    process::Process,
    stdio::{self, Names, Owner},
};
use crate::{agent::ProcessId, streams::Streams};

/// What a container comes to.
enum Place {
    /// It is the sandbox's own, and brings the guest up.
    First,
    /// A guest that runs.
    Joins(Arc<dyn Guest>),
}

impl Service {
    /// Makes a container; answers a host process that stands for its init.
    pub(super) async fn create(&self, request: CreateTaskRequest) -> Result<u32, ServiceError> {
        if !bundle::is_id(&request.id) {
            return Err(ServiceError::Id(request.id));
        }
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(ServiceError::Unsupported("starting from a checkpoint"));
        }
        let spec = bundle::read_spec(Path::new(&request.bundle))?;
        let spec = spec.ok_or_else(|| {
            ServiceError::Argument(format!("there is no config.json in {}", request.bundle))
        })?;
        let place = self.reserve(&request.id, &spec)?;
        let is_first = matches!(place, Place::First);
        let made = self.make(&request, spec, place).await;
        if made.is_err() {
            if !request.rootfs.is_empty() {
                mounts::unmount_all(&mount_point(&request));
            }
            let guest = self.unreserve(&request.id, is_first);
            if let Some(guest) = guest {
                guest.stop().await;
            }
        }
        made
    }

    fn reserve(&self, id: &str, spec: &Spec) -> Result<Place, ServiceError> {
        let mut ledger = self.ledger();
        if ledger.containers.contains_key(id) || ledger.making.contains(id) {
            return Err(ServiceError::ContainerExists(id.to_owned()));
        }
        let place = if matches!(ledger.sandbox, Sandbox::Absent) {
            if bundle::joins(spec) || id != self.0.id {
                return Err(ServiceError::NoSandbox(self.0.id.clone()));
            }
            ledger.sandbox = Sandbox::Starting;
            Place::First
        } else {
            Place::Joins(ledger.guest(&self.0.id)?)
        };
        ledger.making.insert(id.to_owned());
        Ok(place)
    }

    /// Takes a reservation back; answers a guest that nobody needs any more.
    fn unreserve(&self, id: &str, is_first: bool) -> Option<Arc<dyn Guest>> {
        let mut ledger = self.ledger();
        ledger.making.remove(id);
        if !is_first {
            return None;
        }
        match std::mem::replace(&mut ledger.sandbox, Sandbox::Absent) {
            Sandbox::Up(guest) | Sandbox::Lost { guest, .. } => Some(guest),
            Sandbox::Gone => {
                ledger.sandbox = Sandbox::Gone;
                None
            }
            Sandbox::Absent | Sandbox::Declared(_) | Sandbox::Starting => None,
        }
    }

    async fn make(
        &self,
        request: &CreateTaskRequest,
        spec: Spec,
        place: Place,
    ) -> Result<u32, ServiceError> {
        let rootfs = rootfs(request, &spec);
        let (mounts, on) = (request.rootfs.clone(), mount_point(request));
        tokio::task::spawn_blocking(move || mounts::mount_all(&mounts, &on)).await??;
        let is_sandbox = matches!(place, Place::First);
        let guest = match place {
            Place::First => self.launch(self.settings(request, &spec)).await?,
            Place::Joins(guest) => guest,
        };
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let process = ProcessId { container: request.id.clone(), exec: String::new() };
        let container = NewContainer {
            id: request.id.clone(),
            spec,
            bundle: PathBuf::from(&request.bundle),
            rootfs,
            terminal: request.terminal,
            stdin: names.has_input(),
        };
        guest.create(container).await?;
        let owner = Owner { namespace: &self.0.namespace, id: &request.id };
        let connected = async {
            let (ends, attachment) = stdio::open(&names, owner).await?;
            Ok::<_, ServiceError>((guest.connect(&process, ends).await?, attachment))
        };
        let (streams, attachment) = match connected.await {
            Ok(connected) => connected,
            Err(error) => {
                forget(guest.as_ref(), &process).await;
                return Err(error);
            }
        };
        let pid = guest.host_pid();
        let mut init = Process::new(names, None, pid);
        init.attachment = Some(attachment);
        let container = Container {
            init,
            execs: std::collections::BTreeMap::new(),
            bundle: PathBuf::from(&request.bundle),
            stats: None,
            out_of_memory: false,
            is_ending: false,
            is_sandbox,
        };
        self.enter(request, container, &guest, streams)?;
        Ok(pid)
    }

    /// Enters a made container, tells of it, and waits for its end from now on.
    fn enter(
        &self,
        request: &CreateTaskRequest,
        container: Container,
        guest: &Arc<dyn Guest>,
        streams: Streams,
    ) -> Result<(), ServiceError> {
        let process = ProcessId { container: request.id.clone(), exec: String::new() };
        let mut ledger = self.ledger();
        // It may have been lost meanwhile, and nobody would end the new one.
        ledger.guest(&self.0.id)?;
        let mut event = TaskCreate::new();
        event.set_container_id(request.id.clone());
        event.set_bundle(request.bundle.clone());
        event.set_rootfs(request.rootfs.clone());
        event.set_pid(container.init.pid);
        let mut io = TaskIO::new();
        io.set_stdin(request.stdin.clone());
        io.set_stdout(request.stdout.clone());
        io.set_stderr(request.stderr.clone());
        io.set_terminal(request.terminal);
        event.set_io(io);
        ledger.making.remove(&request.id);
        ledger.containers.insert(request.id.clone(), container);
        self.0.publisher.push(&Event::Create(event));
        drop(ledger);
        self.watch_init(Arc::clone(guest), process, streams);
        Ok(())
    }

    fn settings(&self, request: &CreateTaskRequest, spec: &Spec) -> SandboxSettings {
        SandboxSettings {
            id: self.0.id.clone(),
            namespace: self.0.namespace.clone(),
            bundle: PathBuf::from(&request.bundle),
            annotations: bundle::annotations(spec),
            netns: bundle::netns(spec),
            hostname: spec.hostname().clone().unwrap_or_default(),
            cgroup_parent: bundle::cgroup_parent(spec),
            spec: Some(spec.clone()),
            ..SandboxSettings::default()
        }
    }

    /// Brings the guest up. The ledger's sandbox is `Starting`.
    pub(super) async fn launch(
        &self,
        settings: SandboxSettings,
    ) -> Result<Arc<dyn Guest>, ServiceError> {
        let guest = self.0.host.launch(settings).await?;
        if !self.is_up(&guest) {
            // The shim was told to end meanwhile.
            guest.stop().await;
            return Err(ServiceError::NoSandbox(self.0.id.clone()));
        }
        self.watch_guest(&guest);
        Ok(guest)
    }

    /// Notes the guest, if it is still wanted.
    fn is_up(&self, guest: &Arc<dyn Guest>) -> bool {
        let mut ledger = self.ledger();
        let is_wanted = matches!(ledger.sandbox, Sandbox::Starting);
        if is_wanted {
            ledger.sandbox = Sandbox::Up(Arc::clone(guest));
            ledger.up_at = Some(SystemTime::now());
        }
        is_wanted
    }
}

/// Where a root file system goes that containerd leaves to the shim to mount.
fn mount_point(request: &CreateTaskRequest) -> PathBuf {
    Path::new(&request.bundle).join("rootfs")
}

/// The container's root file system: what is mounted for it, else what the specification names.
fn rootfs(request: &CreateTaskRequest, spec: &Spec) -> PathBuf {
    match spec.root() {
        Some(root) if request.rootfs.is_empty() => Path::new(&request.bundle).join(root.path()),
        _ => mount_point(request),
    }
}

/// Ends and forgets a container of which containerd does not know.
async fn forget(guest: &dyn Guest, process: &ProcessId) {
    if let Err(error) = guest.signal(process, libc::SIGKILL, true).await {
        log::debug!("{error}");
    }
    if let Err(error) = guest.delete(process).await {
        log::warn!("container `{}` could not be made and stays: {error}", process.container);
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::types::mount::Mount;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_root_is_what_is_mounted_or_what_the_specification_names() {
        let mut request = CreateTaskRequest { bundle: "/b".to_owned(), ..Default::default() };
        let at = |path: &str| -> Spec {
            serde_json::from_value(json!({"ociVersion": "1.2.0", "root": {"path": path}})).unwrap()
        };
        assert_eq!(rootfs(&request, &at("/elsewhere")), Path::new("/elsewhere"));
        assert_eq!(rootfs(&request, &at("rootfs")), Path::new("/b/rootfs"));
        request.rootfs.push(Mount::default());
        assert_eq!(rootfs(&request, &at("/elsewhere")), Path::new("/b/rootfs"));
    }
}
