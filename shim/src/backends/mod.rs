//! The device backends: started side by side, each with one end of a socket pair whose other end
//! is the VMM's, and from then on kept: a process that ends is replaced.
//!
//! [`Backends`] are the first processes until the VMM knows them; [`Devices`] are what lasts.

mod error;
mod estate;
mod handle;
mod keeper;
mod kind;
mod patience;
mod process;

use std::{future, os::fd::OwnedFd, pin::Pin, sync::Arc, time::Duration};

use futures::{StreamExt, future::try_join_all, stream::FuturesUnordered};
use tokio::{sync::Notify, time::timeout};

pub use error::{BackendError, StoreFault};
#[cfg(test)]
pub(crate) use handle::Desk;
pub use handle::{Condition, DeviceHandle, ReplaceError, View};
pub use process::Surroundings;

pub(crate) use error::said;

use crate::{network::Network, plan::DevicePlan, record::ProcessRecord, vmm::Link};
use estate::Estate;
use keeper::Keeper;
use kind::Role;
use process::{Blueprint, Process};

/// How long a first process may take until it is ready. Generous: it is no work, but the host may
/// be emulated and busy.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// The VMM's end of a backend's socket.
#[derive(Debug)]
pub struct VmmEnd {
    /// The device's id.
    pub id: String,
    /// The VMM's word for the kind of device.
    pub kind: &'static str,
    /// The device's configuration space, for a backend that does not tell it. Empty: it tells.
    pub config: Vec<u8>,
    /// The socket, connected.
    pub socket: OwnedFd,
}

/// A device and its first process.
#[derive(Debug)]
struct Backend {
    process: Process,
    blueprint: Blueprint,
    estate: Estate,
}

/// The first process of each device of a sandbox. Dropping them ends them.
#[derive(Debug)]
pub struct Backends {
    backends: Vec<Backend>,
}

impl Backends {
    /// Starts one for each device and waits for none.
    ///
    /// # Errors
    ///
    /// Fails if one can't be started; those before it are ended.
    pub fn start(
        devices: &[DevicePlan],
        surroundings: &Surroundings,
        network: Option<&Network>,
    ) -> Result<(Self, Vec<VmmEnd>), BackendError> {
        estate::make_room();
        let started = devices.iter().map(|device| {
            let blueprint = Blueprint::new(device, surroundings.clone(), network)?;
            let estate = Estate::new(device.id(), device.state_bytes());
            let estate = estate.map_err(blueprint.prepare())?;
            let (process, socket) = blueprint.start(&blueprint.program(), &estate, Role::First)?;
            let end = blueprint.vmm_end(network, socket);
            Ok((Backend { process, blueprint, estate }, end))
        });
        let started: Vec<(Backend, VmmEnd)> = started.collect::<Result<_, BackendError>>()?;
        let (backends, ends) = started.into_iter().unzip();
        Ok((Self { backends }, ends))
    }

    /// Waits until all are ready.
    ///
    /// # Errors
    ///
    /// Fails as soon as one ends or takes too long.
    pub async fn ready(&mut self) -> Result<(), BackendError> {
        try_join_all(self.backends.iter_mut().map(Backend::ready)).await.map(drop)
    }

    /// Their processes.
    #[must_use]
    pub fn records(&self) -> Vec<ProcessRecord> {
        self.backends.iter().map(|backend| backend.process.child.record()).collect()
    }

    /// From here on they are kept, for a VMM that was started on them.
    pub(crate) fn keep(self, link: &Link) -> Devices {
        let changed = Arc::new(Notify::new());
        let mut devices =
            Devices { keepers: FuturesUnordered::new(), handles: Vec::new(), changed };
        for backend in self.backends {
            devices.keep(backend, link);
        }
        devices
    }
}

impl Backend {
    async fn ready(&mut self) -> Result<(), BackendError> {
        let Process { child, counter, ready } = &mut self.process;
        // A process that is gone says why by its end.
        if let Err(error) = self.estate.hand_over(counter).await {
            log::debug!("{}: {error}", child.name());
        }
        process::ready(child, ready, READY_WITHIN).await
    }
}

/// What [`Devices::next`] tells.
#[derive(Debug)]
pub enum Happening {
    /// A device has another process than before.
    Replaced,
    /// A device can't be served any more.
    GivenUp(BackendError),
}

type Keeping = Pin<Box<dyn Future<Output = Result<(), BackendError>> + Send>>;

/// All devices of a sandbox, as long as its VMM lives. They are kept while [`Self::next`] is
/// polled; dropping them ends all their processes.
pub struct Devices {
    keepers: FuturesUnordered<Keeping>,
    handles: Vec<DeviceHandle>,
    changed: Arc<Notify>,
}

impl Devices {
    fn keep(&mut self, backend: Backend, link: &Link) {
        let Backend { process, blueprint, estate } = backend;
        let device = &blueprint.device;
        let view = View {
            condition: Condition::Serving,
            process: process.child.record(),
            program: blueprint.program(),
            restarts: 0,
        };
        let (handle, desk) = DeviceHandle::new(
            device.id(),
            device.kind(),
            device.is_restartable(),
            view,
            Arc::clone(&self.changed),
        );
        self.handles.push(handle);
        let keeper = Keeper::new(blueprint, estate, link.clone(), desk);
        self.keepers.push(Box::pin(keeper.keep(process)));
    }

    /// Keeps the devices until there is something to tell. May be dropped while it waits.
    pub async fn next(&mut self) -> Happening {
        let changed = Arc::clone(&self.changed);
        tokio::select! {
            biased;
            error = self.given_up() => Happening::GivenUp(error),
            () = changed.notified() => Happening::Replaced,
        }
    }

    /// Keeps the devices until one can't be served any more.
    pub async fn given_up(&mut self) -> BackendError {
        while let Some(kept) = self.keepers.next().await {
            if let Err(error) = kept {
                return error;
            }
        }
        future::pending().await
    }

    /// A way to each of them.
    #[must_use]
    pub fn handles(&self) -> &[DeviceHandle] {
        &self.handles
    }

    /// Their last processes.
    #[must_use]
    pub fn records(&self) -> Vec<ProcessRecord> {
        self.handles.iter().map(|handle| handle.view().process).collect()
    }

    /// Waits until all processes have ended, as they do once the VMM is gone.
    pub async fn stop(&mut self, limit: Duration) {
        let all_gone = async {
            while let Some(kept) = self.keepers.next().await {
                if let Err(error) = kept {
                    log::debug!("{error}");
                }
            }
        };
        if timeout(limit, all_gone).await.is_err() {
            log::debug!("not all backends end when asked");
        }
    }
}

#[cfg(test)]
#[path = "backends_tests.rs"]
mod tests;
