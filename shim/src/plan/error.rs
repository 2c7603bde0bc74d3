//! Why a plan is none, and the exit code that says so.

use std::path::PathBuf;

use nacre_proto::exit::RunExit;

use crate::{image::accounts::AccountError, plan::COMMAND_LINE_BYTES, size::ByteSize};

/// Why there can't be such a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No processors.
    #[error("a sandbox needs at least one CPU")]
    NoCpus,
    /// Fewer processors at most than at first.
    #[error("--max-cpus {max} is less than the {cpus} CPUs of the beginning")]
    MaxCpus {
        /// At most.
        max: u32,
        /// At first.
        cpus: u32,
    },
    /// Less memory at most than at first.
    #[error("--max-memory {max} is less than the {memory} of the beginning")]
    MaxMemory {
        /// At most.
        max: ByteSize,
        /// At first.
        memory: ByteSize,
    },
    /// No memory.
    #[error("a sandbox needs memory: --memory 0 was asked for")]
    NoMemory,
    /// More memory than there is.
    #[error("memory of {asked} is more than the host's memory and swap, {available}")]
    TooMuchMemory {
        /// Asked for.
        asked: ByteSize,
        /// Memory and swap of the host.
        available: ByteSize,
    },
    /// More memory than this host's processors can address.
    #[error("memory of {asked} is more than {address_bits} physical address bits can address")]
    BeyondWidth {
        /// Asked for.
        asked: ByteSize,
        /// The width of the host's processors, which no guest exceeds.
        address_bits: u32,
    },
    /// Nothing to run.
    #[error("no command: none is given and the image names none")]
    NoCommand,
    /// A path that has to be absolute is not.
    #[error("{what} `{}` is not an absolute path", path.display())]
    NotAbsolute {
        /// What it is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A volume in the place of everything.
    #[error("a volume can't be mounted on the container's `/`")]
    VolumeOnRoot,
    /// A variable without a name.
    #[error("`{0}` is no environment variable: NAME=VALUE is expected")]
    Environment(String),
    /// A text with a byte that no argument can have.
    #[error("{0} holds a NUL byte")]
    Nul(&'static str),
    /// A host name that the kernel refuses.
    #[error("`{0}` is no host name: 1 to 64 letters, digits, `.`, `_` and `-` are expected")]
    Hostname(String),
    /// The command line is too long.
    #[error("the kernel's command line has {0} bytes, at most {COMMAND_LINE_BYTES} are possible")]
    CommandLine(usize),
    /// An unknown user.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// The runtime specification is not one.
    #[error("the runtime specification is malformed: {0}")]
    Spec(String),
}

impl PlanError {
    /// The exit code of a command that fails by it.
    #[must_use]
    pub fn exit(&self) -> RunExit {
        match self {
            Self::NoCpus | Self::MaxCpus { .. } => RunExit::Cpus,
            Self::NoMemory
            | Self::TooMuchMemory { .. }
            | Self::BeyondWidth { .. }
            | Self::MaxMemory { .. } => RunExit::Memory,
            Self::NoCommand
            | Self::NotAbsolute { .. }
            | Self::VolumeOnRoot
            | Self::Environment(_)
            | Self::Nul(_)
            | Self::Hostname(_)
            | Self::CommandLine(_)
            | Self::Account(_) => RunExit::Usage,
            Self::Spec(_) => RunExit::Setup,
        }
    }
}
