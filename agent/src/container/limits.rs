//! Stopping a container where it is, changing its limits, counting what it uses.

use std::sync::Arc;

use libcontainer::oci_spec::runtime::LinuxResources;
use nacre_proto::agent::StatsResponse;

use crate::{
    cgroup::{Cgroup, limits},
    container::{
        Container, ContainerError, Containers,
        spec::{SPEC_BYTES_MAX, SpecError},
    },
    ids::ContainerId,
};

impl Containers {
    /// Stops all processes of a running container, and answers when they have stopped.
    pub(crate) async fn pause(&self, id: &ContainerId) -> Result<(), ContainerError> {
        let container = self.container(id)?;
        if !container.init.is_running() {
            return Err(ContainerError::NotRunning(id.clone()));
        }
        if container.cgroup.is_frozen() {
            return Err(ContainerError::Paused(id.clone()));
        }
        Ok(container.cgroup.freeze(true).await?)
    }

    /// Lets the processes of a stopped container go on.
    pub(crate) async fn resume(&self, id: &ContainerId) -> Result<(), ContainerError> {
        let container = self.container(id)?;
        if !container.cgroup.is_frozen() {
            return Err(ContainerError::NotPaused(id.clone()));
        }
        Ok(container.cgroup.freeze(false).await?)
    }

    /// Changes the limits of a container that has not ended: all, or none.
    pub(crate) fn update(&self, id: &ContainerId, json: &[u8]) -> Result<(), ContainerError> {
        let container = self.container(id)?;
        if container.init.exit().is_some() {
            return Err(ContainerError::NotRunning(id.clone()));
        }
        let cgroup: &Cgroup = &container.cgroup;
        let settings = limits::settings(&resources(json)?).map_err(SpecError::Limits)?;
        Ok(cgroup.set(&settings)?)
    }

    /// What a container uses and used; its group outlives its processes until it is deleted.
    pub(crate) fn stats(&self, id: &ContainerId) -> Result<StatsResponse, ContainerError> {
        let container: Arc<Container> = self.container(id)?;
        Ok(container.cgroup.stats())
    }
}

fn resources(json: &[u8]) -> Result<LinuxResources, SpecError> {
    if json.len() > SPEC_BYTES_MAX {
        return Err(SpecError::TooLarge(json.len()));
    }
    let resources: LinuxResources = serde_json::from_slice(json).map_err(SpecError::Parse)?;
    if resources.devices().as_ref().is_some_and(|rules| !rules.is_empty()) {
        // What the host's runtimes do, too: they are about what a container is made with.
        log::debug!("device rules of an update are left out");
    }
    Ok(resources)
}
