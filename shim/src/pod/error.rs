//! Why a pod does not do what it is asked, and of which kind that is for whoever asked.

use ttrpc::Code;

use crate::{
    agent::AgentError, name::NameError, plan::PlanError, registry::RegistryError,
    sandbox::SandboxError, streams::StreamError,
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
    /// The pod is no more.
    #[error("the pod has ended: {0}")]
    Ended(String),
}

impl PodError {
    /// Of which kind it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Id(_) | Self::Plan(_) => ErrorKind::InvalidArgument,
            Self::Sandbox(SandboxError::Registry(RegistryError::InUse { .. })) => {
                ErrorKind::AlreadyExists
            }
            Self::Sandbox(_) => ErrorKind::Internal,
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
