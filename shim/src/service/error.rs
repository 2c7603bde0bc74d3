//! Why the service refuses, as codes of gRPC: containerd acts by the code, not by the words.

use containerd_shim_protos::ttrpc::{self, Code};

use super::{
    bundle::BundleError,
    guest::{GuestError, GuestErrorKind},
    mounts::MountError,
    phase::{Phase, Request},
    stdio::StdioError,
};
use crate::error_chain;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServiceError {
    #[error("there is no container `{0}`")]
    NoContainer(String),
    #[error("container `{container}` has no process `{exec}`")]
    NoProcess { container: String, exec: String },
    #[error("there is a container `{0}` already")]
    ContainerExists(String),
    #[error("container `{container}` has a process `{exec}` already")]
    ProcessExists { container: String, exec: String },
    #[error("process is {phase} and can't be {request}")]
    Phase { phase: Phase, request: Request },
    #[error("process already finished")]
    Finished,
    #[error("process was not started")]
    NotStarted,
    #[error("`{0}` is no id")]
    Id(String),
    #[error("{0}")]
    Argument(String),
    #[error("sandbox `{0}` is not running")]
    NoSandbox(String),
    #[error("this is sandbox `{0}`")]
    OtherSandbox(String),
    #[error("sandbox `{0}` is there already")]
    SandboxExists(String),
    #[error("sandbox is lost: {0}")]
    SandboxLost(String),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error("the request was given up")]
    GivenUp(#[from] tokio::task::JoinError),
}

impl ServiceError {
    /// The code that containerd is answered.
    pub(super) fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ProcessExists { .. } | Self::SandboxExists(_) => {
                Code::ALREADY_EXISTS
            }
            Self::Phase { .. } | Self::NotStarted | Self::NoSandbox(_) => Code::FAILED_PRECONDITION,
            Self::Id(_) | Self::Argument(_) | Self::Bundle(_) => Code::INVALID_ARGUMENT,
            Self::OtherSandbox(_) => Code::NOT_FOUND,
            Self::SandboxLost(_) => Code::UNAVAILABLE,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Stdio(error) if error.is_argument() => Code::INVALID_ARGUMENT,
            Self::Mount(_) | Self::Stdio(_) | Self::GivenUp(_) => Code::INTERNAL,
            Self::Guest(error) => match error.kind {
                GuestErrorKind::NotFound => Code::NOT_FOUND,
                GuestErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
                GuestErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
                GuestErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
                GuestErrorKind::Unavailable => Code::UNAVAILABLE,
                GuestErrorKind::Unimplemented => Code::UNIMPLEMENTED,
                GuestErrorKind::Internal => Code::INTERNAL,
            },
        }
    }
}

impl From<ServiceError> for ttrpc::Error {
    fn from(error: ServiceError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error_chain(&error)))
    }
}
