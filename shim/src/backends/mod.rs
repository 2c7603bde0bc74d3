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
mod roster;

use std::{collections::BTreeMap, future, os::fd::OwnedFd, pin::Pin, sync::Arc, time::Duration};

use futures::{StreamExt, future::try_join_all, stream::FuturesUnordered};
use tokio::{sync::Notify, time::timeout};

pub use error::{BackendError, StoreFault};
#[cfg(test)]
pub(crate) use handle::Desk;
pub use handle::{Condition, DeviceHandle, ReplaceError, View};
pub use patience::Enough;
pub use process::Surroundings;
pub use roster::Roster;

pub(crate) use error::said;

use crate::{network::Nic, plan::DevicePlan, record::ProcessRecord, vmm::Link};
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
pub(crate) struct Backend {
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
    /// Starts one for each device and waits for none. `nics` are those of the network devices, by
    /// their ids.
    ///
    /// # Errors
    ///
    /// Fails if one can't be started; those before it are ended.
    pub fn start(
        devices: &[DevicePlan],
        surroundings: &Surroundings,
        nics: &BTreeMap<String, Nic>,
    ) -> Result<(Self, Vec<VmmEnd>), BackendError> {
        estate::make_room();
        let started = devices
            .iter()
            .map(|device| Backend::start(device, surroundings.clone(), nics.get(device.id())));
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
        let mut devices = Devices {
            keepers: FuturesUnordered::new(),
            roster: Roster::default(),
            changed: Arc::new(Notify::new()),
        };
        for backend in self.backends {
            devices.keep(backend, link);
        }
        devices
    }
}

impl Backend {
    /// Starts the first process of a device; also what the VMM is to have of it.
    pub(crate) fn start(
        device: &DevicePlan,
        surroundings: Surroundings,
        nic: Option<&Nic>,
    ) -> Result<(Self, VmmEnd), BackendError> {
        let blueprint = Blueprint::new(device, surroundings, nic)?;
        let estate = Estate::new(device.id(), device.state_bytes());
        let estate = estate.map_err(blueprint.prepare())?;
        let (process, socket) = blueprint.start(&blueprint.program(), &estate, Role::First)?;
        let end = blueprint.vmm_end(nic, socket);
        Ok((Self { process, blueprint, estate }, end))
    }

    /// Waits until its process is ready.
    pub(crate) async fn ready(&mut self) -> Result<(), BackendError> {
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
    /// The VMM has a device no more, and all that was kept for it is gone.
    Gone(String),
    /// A device can't be served any more.
    GivenUp(BackendError),
}

/// Ends with the device's id.
type Keeping = Pin<Box<dyn Future<Output = (String, Result<(), BackendError>)> + Send>>;

/// All devices of a sandbox, as long as its VMM lives. They are kept while [`Self::next`] is
/// polled; dropping them ends all their processes.
pub struct Devices {
    keepers: FuturesUnordered<Keeping>,
    roster: Roster,
    changed: Arc<Notify>,
}

impl Devices {
    /// Keeps another one, which the VMM knows.
    pub(crate) fn keep(&mut self, backend: Backend, link: &Link) {
        let Backend { process, blueprint, estate } = backend;
        let device = blueprint.device.clone();
        let view = View {
            condition: Condition::Serving,
            process: process.child.record(),
            program: blueprint.program(),
            restarts: 0,
        };
        let id = device.id().to_owned();
        let changed = Arc::clone(&self.changed);
        let (handle, desk) = DeviceHandle::new(device, view, changed);
        self.roster.add(handle);
        let keeper = Keeper::new(blueprint, estate, link.clone(), desk);
        self.keepers.push(Box::pin(async move { (id, keeper.keep(process).await) }));
    }

    /// Keeps the devices until there is something to tell. May be dropped while it waits.
    pub async fn next(&mut self) -> Happening {
        let changed = Arc::clone(&self.changed);
        tokio::select! {
            biased;
            over = self.over() => match over {
                (_device, Err(error)) => Happening::GivenUp(error),
                (device, Ok(())) => Happening::Gone(device),
            },
            () = changed.notified() => Happening::Replaced,
        }
    }

    /// Keeps the devices until one can't be served any more.
    pub async fn given_up(&mut self) -> BackendError {
        loop {
            if let (_device, Err(error)) = self.over().await {
                return error;
            }
        }
    }

    /// Keeps the devices until one need not be kept any more, or can't.
    async fn over(&mut self) -> (String, Result<(), BackendError>) {
        match self.keepers.next().await {
            Some((device, kept)) => {
                self.roster.remove(&device);
                (device, kept)
            }
            None => future::pending().await,
        }
    }

    /// A way to each of them.
    #[must_use]
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// Their last processes.
    #[must_use]
    pub fn records(&self) -> Vec<ProcessRecord> {
        self.roster.all().iter().map(|handle| handle.view().process).collect()
    }

    /// Waits until all processes have ended, as they do once the VMM is gone.
    pub async fn stop(&mut self, limit: Duration) {
        let all_gone = async {
            while let Some((_device, kept)) = self.keepers.next().await {
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
