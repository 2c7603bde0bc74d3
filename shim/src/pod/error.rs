//! Why a pod does not do what it is asked, and of which kind that is for whoever asked.

use std::path::PathBuf;

use ttrpc::Code;

use crate::{
    agent::AgentError,
    name::NameError,
    plan::{PlanError, inputs::InputError},
    pod::{ShareError, SpecError},
    registry::RegistryError,
    sandbox::SandboxError,
    streams::StreamError,
};

/// The kinds that the protocols of containerd tell apart, by their gRPC names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no such thing.
    NotFound,
    /// There is such a thing already.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// Never, as it was asked.
    InvalidArgument,
    /// The pod is not there any more, or does not answer.
    Unavailable,
    /// The host or the guest fails at it.
    Internal,
}

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Its id can be no name.
    #[error("the pod's id")]
    Id(#[from] NameError),
    /// What is asked for makes no sense on this host.
    #[error("the pod can't be as asked")]
    Plan(#[from] PlanError),
    /// The sandbox fails.
    #[error("the pod's sandbox")]
    Sandbox(#[from] SandboxError),
    /// The guest's agent does not do it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The process's streams can't be connected.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A file that the pod is to boot can't be used, or the host tells nothing of itself.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The container's specification can't be followed.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The container's limits are none.
    #[error("the limits are malformed")]
    Limits(#[source] serde_json::Error),
    /// What the container needs of the host's files can't be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The id can be no container's.
    #[error("`{0}` is no id for a container: letters, digits, `_`, `.` and `-` are expected")]
    ContainerId(String),
    /// There is such a container.
    #[error("there is a container `{0}` already")]
    Exists(String),
    /// There is no such container.
    #[error("there is no container `{0}`")]
    Unknown(String),
    /// The guest can't be given what its containers are allowed.
    #[error("the guest can't be given what its containers are allowed: {0}")]
    Size(String),
    /// A block device of the host's can't be the guest's.
    #[error("the block device {}: {why}", path.display())]
    Disk {
        /// On the host.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The VMM does not tell what there is.
    #[error("the VMM: {0}")]
    Refused(String),
    /// The pod is no more.
    #[error("the pod has ended: {0}")]
    Ended(String),
}

impl PodError {
    /// Of which kind it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Id(_)
            | Self::Plan(_)
            | Self::Spec(_)
            | Self::Limits(_)
            | Self::ContainerId(_) => ErrorKind::InvalidArgument,
            Self::Exists(_) => ErrorKind::AlreadyExists,
            Self::Unknown(_) => ErrorKind::NotFound,
            Self::Sandbox(SandboxError::Registry(RegistryError::InUse { .. })) => {
                ErrorKind::AlreadyExists
            }
            Self::Sandbox(_)
            | Self::Input(_)
            | Self::Share(_)
            | Self::Size(_)
            | Self::Disk { .. }
            | Self::Refused(_) => ErrorKind::Internal,
            Self::Agent(error) => of_agent(error),
            Self::Stream(_) | Self::Ended(_) => ErrorKind::Unavailable,
        }
    }
}

fn of_agent(error: &AgentError) -> ErrorKind {
    match error {
        AgentError::Refused { code, .. } => match code {
            Code::NOT_FOUND => ErrorKind::NotFound,
            Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
            Code::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
            Code::INVALID_ARGUMENT => ErrorKind::InvalidArgument,
            _ => ErrorKind::Internal,
        },
        AgentError::Unreachable(_) | AgentError::Mute | AgentError::Lost { .. } => {
            ErrorKind::Unavailable
        }
        AgentError::Version(_) => ErrorKind::Internal,
    }
}
