//! Namespaces that a container does not get of its own.

use std::{fs::File, io, os::fd::AsRawFd, path::PathBuf};

use libcontainer::oci_spec::runtime::LinuxNamespaceType;
use nacre_proto::agent::SharedNamespace;
use rustix::process::getpid;

use crate::{
    container::{ContainerError, Containers, spec::SpecError},
    holder,
    ids::ContainerId,
    process::state::Live,
    sys,
};

/// Which namespace, and whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamespaceRequest {
    kind: LinuxNamespaceType,
    /// Absent: the sandbox's own.
    owner: Option<ContainerId>,
}

/// A namespace that is held open.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Of which kind.
    pub(crate) kind: LinuxNamespaceType,
    file: File,
}

impl Shared {
    /// A path by which the launcher finds it, as long as this value lives.
    pub(crate) fn path(&self) -> PathBuf {
        let agent = getpid().as_raw_nonzero();
        PathBuf::from(format!("/proc/{agent}/fd/{}", self.file.as_raw_fd()))
    }

    #[cfg(test)]
    pub(crate) fn of_tests(kind: LinuxNamespaceType) -> Self {
        Self { kind, file: File::open("/proc/self/ns/ipc").unwrap() }
    }
}

impl NamespaceRequest {
    /// Checks what the host gave.
    pub(crate) fn parse_all(shared: &[SharedNamespace]) -> Result<Vec<Self>, ContainerError> {
        let mut requests = Vec::<Self>::new();
        for one in shared {
            let request = Self::parse(one)?;
            if requests.iter().any(|other| other.kind == request.kind) {
                return Err(no_namespace("two namespaces of one kind", &one.kind));
            }
            requests.push(request);
        }
        Ok(requests)
    }

    fn parse(shared: &SharedNamespace) -> Result<Self, ContainerError> {
        let kind = match shared.kind.as_str() {
            "ipc" => LinuxNamespaceType::Ipc,
            "uts" => LinuxNamespaceType::Uts,
            "pid" => LinuxNamespaceType::Pid,
            other => return Err(no_namespace("a shared namespace of this kind", other)),
        };
        let owner = match shared.container_id.as_str() {
            "" => None,
            id => Some(ContainerId::parse(id)?),
        };
        Ok(Self { kind, owner })
    }

    fn name(&self) -> &'static str {
        match self.kind {
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Uts => "uts",
            _ => "pid",
        }
    }
}

fn no_namespace(what: &'static str, value: &str) -> ContainerError {
    SpecError::Invalid { what, value: value.to_owned() }.into()
}

impl Containers {
    /// Opens the namespaces that a new container is to be in.
    pub(super) fn shared(
        &self,
        requests: &[NamespaceRequest],
    ) -> Result<Vec<Shared>, ContainerError> {
        requests.iter().map(|request| self.open(request)).collect()
    }

    fn open(&self, request: &NamespaceRequest) -> Result<Shared, ContainerError> {
        let kind = request.kind;
        let owner = match (&request.owner, kind) {
            (Some(id), _) => {
                let live = self.container(id)?.init.live();
                live.ok_or_else(|| ContainerError::NotRunning(id.clone()))?
            }
            (None, LinuxNamespaceType::Pid) => self.pid_namespace()?,
            // The agent's own, which is the guest's: nothing else of the agent is in them.
            (None, _) => {
                let path = PathBuf::from("/proc/self/ns").join(request.name());
                let file = File::open(&path);
                let file = file.map_err(|source| ContainerError::File { path, source })?;
                return Ok(Shared { kind, file });
            }
        };
        let path = PathBuf::from(format!("/proc/{}/ns", owner.pid.as_raw_nonzero()));
        let path = path.join(request.name());
        let open = || -> io::Result<File> {
            let file = File::open(&path)?;
            // What was opened is the owner's if it still lives.
            sys::signal_pidfd(&owner.pidfd, 0)?;
            Ok(file)
        };
        let file = open().map_err(|source| ContainerError::File { path: path.clone(), source })?;
        Ok(Shared { kind, file })
    }

    /// The sandbox's own PID namespace, made when it is first asked for.
    fn pid_namespace(&self) -> Result<Live, ContainerError> {
        // Held while it is made, for there is to be one.
        let mut holder = super::lock(&self.holder);
        if let Some(live) = &*holder {
            return Ok(live.clone());
        }
        Ok(holder.insert(holder::make(&self.reaper)?).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(kind: &str, container: &str) -> SharedNamespace {
        SharedNamespace {
            kind: kind.to_owned(),
            container_id: container.to_owned(),
            ..SharedNamespace::new()
        }
    }

    #[test]
    fn three_kinds_of_namespaces_can_be_shared_each_once() {
        let given = [shared("ipc", ""), shared("uts", "a"), shared("pid", "a")];
        let requests = NamespaceRequest::parse_all(&given).unwrap();
        assert_eq!(
            requests.iter().map(NamespaceRequest::name).collect::<Vec<_>>(),
            ["ipc", "uts", "pid"]
        );
        assert_eq!(requests[0].owner, None);
        for bad in [shared("mount", ""), shared("network", ""), shared("ipc", "../a")] {
            assert!(NamespaceRequest::parse_all(&[bad]).is_err());
        }
        assert!(NamespaceRequest::parse_all(&[shared("ipc", ""), shared("ipc", "a")]).is_err());
    }
}
