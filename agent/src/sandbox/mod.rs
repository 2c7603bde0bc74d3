//! What the host configures once, before any container: identity, network, storages.

use std::sync::Mutex;

use nacre_proto::agent::ConfigureSandboxRequest;
use ttrpc::Code;

use crate::sandbox::{
    disks::DiskError,
    identity::{Identity, IdentityError},
    neighbors::Neighbors,
    network::{Network, NetworkError},
    storage::{StorageError, StoragePlan},
    sysctl::{SysctlError, Sysctls},
};

pub(crate) mod disks;
pub(crate) mod identity;
mod neighbors;
mod netlink;
pub(crate) mod network;
pub(crate) mod storage;
mod sysctl;

/// Why the sandbox could not be configured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// A second time.
    #[error("the sandbox is configured already")]
    ConfiguredBefore,
    /// Name, clock, seed or name servers.
    #[error("can't take the identity on")]
    Identity(#[from] IdentityError),
    /// The network.
    #[error("can't set the network up")]
    Network(#[from] NetworkError),
    /// A setting of the kernel.
    #[error("can't change the kernel's settings")]
    Sysctl(#[from] SysctlError),
    /// A storage.
    #[error("can't set a storage up")]
    Storage(#[from] StorageError),
}

impl SandboxError {
    /// What the host is told apart from the words.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::ConfiguredBefore => Code::FAILED_PRECONDITION,
            Self::Identity(error) if error.is_hosts() => Code::INVALID_ARGUMENT,
            Self::Network(NetworkError::Invalid { .. } | NetworkError::TooMany { .. })
            | Self::Sysctl(SysctlError::Invalid { .. } | SysctlError::TooMany(_))
            | Self::Storage(StorageError::Invalid { .. } | StorageError::TooMany(_)) => {
                Code::INVALID_ARGUMENT
            }
            Self::Network(NetworkError::NoDevice { .. })
            | Self::Storage(StorageError::Disk(DiskError::NoDisk { .. })) => Code::NOT_FOUND,
            Self::Identity(_) | Self::Network(_) | Self::Sysctl(_) | Self::Storage(_) => {
                Code::INTERNAL
            }
        }
    }
}

/// The configuration, checked.
#[derive(Debug)]
struct Plan {
    identity: Identity,
    sysctls: Sysctls,
    network: Network,
    neighbors: Neighbors,
    storages: Vec<StoragePlan>,
}

/// The guest as a whole.
#[derive(Debug, Default)]
pub(crate) struct Sandbox {
    /// Whether it was configured; a failed try counts, since half of it may have been done.
    configured: Mutex<bool>,
}

impl Sandbox {
    /// Checks all of the configuration, and then applies it.
    pub(crate) async fn configure(
        &self,
        request: ConfigureSandboxRequest,
    ) -> Result<(), SandboxError> {
        let plan = Plan {
            identity: Identity::parse(&request)?,
            network: Network::parse(&request.interfaces, &request.routes)?,
            sysctls: Sysctls::parse(&request.sysctls)?,
            neighbors: Neighbors::parse(&request.neighbors)?,
            storages: StoragePlan::parse_all(&request.storages)?,
        };
        {
            // Nothing panics while it is held.
            let mut configured =
                self.configured.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if *configured {
                return Err(SandboxError::ConfiguredBefore);
            }
            *configured = true;
        }
        plan.identity.apply()?;
        // Before the network: some settings are about what its interfaces do when they come up.
        let (early, late) = plan.sysctls.split();
        early.apply()?;
        plan.network.apply().await?;
        plan.neighbors.apply()?;
        late.apply()?;
        for storage in &plan.storages {
            storage.mount().await?;
        }
        Ok(())
    }
}
