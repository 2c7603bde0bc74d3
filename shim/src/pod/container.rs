//! Containers of a pod: how they come, change and go.
//!
//! ```text
//!  specification amended -> files in the share -> the guest as large as is needed -> disks
//!    -> the agent makes it -> ... -> the agent forgets it -> disks, files and size go back
//! ```
//! What fails half-way is undone in reverse.

use std::path::PathBuf;

use nacre_proto::agent::{CreateContainerRequest, Device};
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::task::spawn_blocking;

use crate::{
    agent::ProcessId,
    plan,
    pod::{
        NewContainer, Pod, PodError, Shared,
        release::{self, Mounts},
        share::{self, Folder},
        sizing::Limits,
        spec::{self, Amended, DiskBind, Places},
    },
    sandbox::SandboxError,
};

/// The longest id that containerd has, in bytes.
const ID_BYTES: usize = 76;

/// What the pod has for a container.
#[derive(Clone, Debug)]
pub(super) struct Container {
    folder: Folder,
    limits: Limits,
    /// The serials of its disks.
    disks: Vec<String>,
}

impl Pod {
    /// Makes a container and leaves it before its program.
    ///
    /// # Errors
    ///
    /// Fails, with nothing left, if the specification can't be followed, the host or the agent
    /// refuses, or the pod is no more.
    pub async fn create(&self, new: NewContainer) -> Result<(), PodError> {
        let shared = &self.shared;
        check_id(&new.id)?;
        let NewContainer { id, spec, rootfs, terminal, stdin } = new;
        let limits = limits(&spec);
        let folder = shared.share.reserve(&id);
        let sandbox = shared.sandbox_of(&id);
        shared.claim(&id, Container { folder: folder.clone(), limits, disks: Vec::new() })?;
        let made = async {
            let places = Places { id: &id, folder: &folder.in_guest(), sandbox: &sandbox };
            let amended = spec::amend(spec, places, &share::look)?;
            self.fill(&folder, rootfs, &amended).await?;
            shared.grow().await?;
            let request = CreateContainerRequest {
                container_id: id.clone(),
                devices: self.bring_disks(&id, &amended.disks).await?,
                oci_spec: serde_json::to_vec(&amended.spec).map_err(SandboxError::Spec)?,
                namespaces: amended.namespaces,
                terminal,
                stdin,
                ..CreateContainerRequest::default()
            };
            shared.guarded(shared.ways.agent.create(&request)).await
        };
        let made = made.await;
        if made.is_err() {
            self.clear(&id).await;
        }
        made
    }

    /// Changes a container's limits, by the `linux.resources` object of an OCI runtime specification.
    ///
    /// # Errors
    ///
    /// Fails if it is none, the agent refuses, or the pod is no more.
    pub async fn update(&self, id: &str, resources_json: Vec<u8>) -> Result<(), PodError> {
        let shared = &self.shared;
        let mut resources: LinuxResources =
            serde_json::from_slice(&resources_json).map_err(PodError::Limits)?;
        spec::without_host(&mut resources);
        let unknown = || PodError::Unknown(id.to_owned());
        let before = shared.containers().get(id).ok_or_else(unknown)?.limits;
        let set = |limits| {
            shared.containers().get_mut(id).into_iter().for_each(|known| known.limits = limits);
        };
        set(before.changed_by(&resources));
        // The guest has it before the container may use it.
        let changed = async {
            shared.grow().await?;
            let json = serde_json::to_vec(&resources).map_err(PodError::Limits)?;
            shared.guarded(shared.ways.agent.update(id, json)).await
        };
        let changed = changed.await;
        if changed.is_err() {
            set(before);
        }
        shared.shrink().await;
        changed
    }

    pub(super) async fn remove(&self, process: &ProcessId) -> Result<(), PodError> {
        self.shared.guarded(self.shared.ways.agent.delete(process)).await?;
        self.clear(&process.container).await;
        Ok(())
    }

    /// Mounts take as long as the file systems that they are of.
    async fn fill(
        &self,
        folder: &Folder,
        rootfs: PathBuf,
        amended: &Amended,
    ) -> Result<(), PodError> {
        let (pod, folder, binds) = (self.clone(), folder.clone(), amended.binds.clone());
        let filled = spawn_blocking(move || pod.shared.share.fill(&folder, &rootfs, &binds)).await;
        match filled {
            Ok(filled) => Ok(filled?),
            Err(_panic) => Err(PodError::Ended("its runtime is going down".to_owned())),
        }
    }

    async fn bring_disks(&self, id: &str, disks: &[DiskBind]) -> Result<Vec<Device>, PodError> {
        let mut devices = Vec::new();
        for DiskBind { path, place, read_only } in disks {
            let operator = &self.shared.ways.operator;
            let brought = operator.bring_disk_in_turn(path, *read_only).await;
            let serial = brought.map_err(|why| PodError::Disk { path: path.clone(), why })?;
            if let Some(known) = self.shared.containers().get_mut(id) {
                known.disks.push(serial.clone());
            }
            devices.push(Device {
                serial,
                container_path: place.to_string_lossy().into_owned(),
                read_only: *read_only,
                ..Device::default()
            });
        }
        Ok(devices)
    }

    /// Takes back what the pod has for a container that the guest does not have any more.
    async fn clear(&self, id: &str) {
        let Some(container) = self.shared.containers().get(id).cloned() else { return };
        for disk in &container.disks {
            if let Err(why) = self.shared.ways.operator.take_off_in_turn(disk).await {
                log::warn!("the disk `{disk}` of container `{id}` stays: {why}");
            }
        }
        let roster = self.shared.ways.roster.clone();
        let mounts = Mounts::of(&roster, plan::POD, container.folder.name());
        let pod = self.clone();
        if spawn_blocking(move || pod.shared.share.empty(&container.folder)).await.is_err() {
            log::debug!("the runtime is going down");
        }
        if let Some(mounts) = mounts {
            tokio::spawn(release::see_to(roster, plan::POD, mounts));
        }
        self.shared.containers().remove(id);
        self.shared.shrink().await;
    }
}

impl Shared {
    fn claim(&self, id: &str, container: Container) -> Result<(), PodError> {
        let mut containers = self.containers();
        if containers.contains_key(id) {
            return Err(PodError::Exists(id.to_owned()));
        }
        containers.insert(id.to_owned(), container);
        Ok(())
    }

    /// Whose the namespaces are that a pod's containers share: the container's that has the pod's
    /// id, or, without one, the sandbox's own.
    fn sandbox_of(&self, id: &str) -> String {
        let has_one = id == self.id || self.containers().contains_key(&self.id);
        if has_one { self.id.clone() } else { String::new() }
    }

    /// Gives the guest what it needs for its containers, if it has less.
    async fn grow(&self) -> Result<(), PodError> {
        let _turn = self.resizing.lock().await;
        let change = async {
            let now = self.ways.operator.resources().await?;
            let wanted = self.wanted(0);
            let cpus = wanted.cpus.max(now.cpus);
            let memory_bytes = wanted.memory_bytes.max(now.memory_bytes);
            if (cpus, memory_bytes) == (now.cpus, now.memory_bytes) {
                return Ok(());
            }
            self.ways.operator.resize_in_turn(cpus, memory_bytes).await
        };
        self.guarded(async { change.await.map_err(PodError::Size) }).await
    }

    /// Takes from the guest what its containers are not allowed any more and do not use, as far as
    /// it lets go.
    async fn shrink(&self) {
        let _turn = self.resizing.lock().await;
        let change = async {
            let now = self.ways.operator.resources().await?;
            let wanted = self.wanted(self.used_bytes().await);
            if wanted.cpus >= now.cpus && wanted.memory_bytes >= now.memory_bytes {
                return Ok(());
            }
            let cpus = wanted.cpus.min(now.cpus);
            let memory_bytes = wanted.memory_bytes.min(now.memory_bytes);
            self.ways.operator.resize_in_turn(cpus, memory_bytes).await
        };
        let changed = self.guarded(async { change.await.map_err(PodError::Size) }).await;
        if let Err(error) = changed {
            log::info!("the guest stays larger than it need be: {error}");
        }
    }

    fn wanted(&self, used_bytes: u64) -> super::Size {
        let limits: Vec<Limits> =
            self.containers().values().map(|container| container.limits).collect();
        let (base, most) = self.sizes;
        base.with(limits.into_iter(), most, used_bytes)
    }

    /// By the guest's word, which harms only itself.
    async fn used_bytes(&self) -> u64 {
        let ids: Vec<String> = self.containers().keys().cloned().collect();
        let mut used = 0_u64;
        for id in ids {
            if let Ok(stats) = self.ways.agent.stats(&id).await {
                used = used.saturating_add(stats.memory_use.get("current").unwrap_or(0));
            }
        }
        used
    }
}

fn limits(spec: &Spec) -> Limits {
    let linux = spec.linux().as_ref();
    Limits::of(linux.and_then(|linux| linux.resources().as_ref()))
}

/// The id is a folder's name, too.
fn check_id(id: &str) -> Result<(), PodError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let begins = id.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && id.len() <= ID_BYTES && id.chars().all(fits) {
        return Ok(());
    }
    Err(PodError::ContainerId(id.chars().take(ID_BYTES).filter(|c| c.is_ascii_graphic()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_could_leave_its_folder_is_none() {
        for id in ["", ".", "..", "../x", "a/b", "a~2", "-x", "a\n", &"x".repeat(77)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        for id in ["a", "4f0c", "redis-1.2_x", &"x".repeat(76)] {
            assert!(check_id(id).is_ok(), "{id:?}");
        }
    }
}
