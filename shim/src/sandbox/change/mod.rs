//! Changes of a sandbox that runs: more or less of what its guest has, devices that come and go.
//!
//! Each change is one request of a client's, and there is one at a time. It asks the VMM and the
//! agent by itself; what only the sandbox's own task may do (keep a device, make a network, write
//! the record) it asks that task for, by an [`Errand`]. A change that can't be made leaves things as
//! they were, or says how they are.

mod add;
mod function;
mod remove;
mod resize;
mod turn;

use std::{collections::BTreeMap, time::Duration};

use nacre_proto::{
    agent::{
        DeviceRequest, DiskUse, Interface, InterfaceUse, Route, ShareUse, device_request::Purpose,
    },
    pci::PciAddress,
    supervisor::{Answer, NewDevice, Resources},
    vmm::Status,
};
use tokio::sync::{Mutex, mpsc, oneshot};
use vfio::{HostAddress, Opened};

use crate::{
    agent::Agent,
    backends::{Backend, Roster, Surroundings},
    error_chain,
    network::{Network, NetworkError},
    passthrough::Function,
    plan::{self, DevicePlan},
    sandbox::SandboxError,
    vmm::{Link, VmmError},
};

/// How long the VMM may take for what does not need the guest.
const VMM_WITHIN: Duration = Duration::from_secs(60);

/// What a client asks for.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// Other amounts of processors and memory.
    Resize {
        /// How many processors.
        cpus: Option<u32>,
        /// How much memory.
        memory_bytes: Option<u64>,
    },
    /// Another device.
    Add(NewDevice),
    /// One device less.
    Remove(String),
}

/// What a change needs the sandbox's own task for.
pub(super) enum Errand {
    /// Keep this device, which the VMM has, from now on.
    Keep(Box<Backend>),
    /// Make a network for this device.
    MakeNetwork(String, oneshot::Sender<Result<Network, NetworkError>>),
    /// Take the network of this device down, if it has one.
    EndNetwork(String),
    /// Have this device of the host's, from its driver if it may be taken, and open it.
    OpenDevice(Function, oneshot::Sender<Result<Opened, SandboxError>>),
    /// Give this device of the host's, which nobody has open, back to its driver.
    GiveBack(HostAddress),
    /// Write down what the guest has now.
    Record(Resources),
    /// Answer, once all that happened before is seen to.
    Settle(oneshot::Sender<()>),
}

/// Whoever makes the changes.
pub(crate) struct Operator {
    pub(super) link: Link,
    pub(super) agent: Agent,
    pub(super) surroundings: Surroundings,
    pub(super) roster: Roster,
    /// The container that devices are for; empty: each has its own.
    pub(super) container: String,
    pub(super) errands: mpsc::Sender<Errand>,
    /// The host's devices that the guest has, by their ids. Held while there is a change under
    /// way, which may outlast its client.
    pub(super) functions: Mutex<BTreeMap<String, Function>>,
}

/// Why something was not done, in a sentence for the client.
type Why = String;

impl Operator {
    /// Makes a change, to its end or back.
    pub(super) async fn carry_out(&self, change: Change) -> Answer {
        // A device that is one container's comes with that container.
        let is_device = matches!(&change, Change::Add(_) | Change::Remove(_));
        if is_device && self.container.is_empty() {
            return Answer::Refused("a pod's devices come and go with its containers".to_owned());
        }
        let Ok(mut functions) = self.functions.try_lock() else {
            return Answer::Refused("another change is being made: try again later".to_owned());
        };
        match change {
            Change::Resize { cpus, memory_bytes } => self.resize(cpus, memory_bytes).await,
            Change::Add(NewDevice::Vfio { address, bind, ip }) => {
                self.add_function(&mut functions, (&address, bind, ip)).await
            }
            Change::Add(new) => self.add(new).await,
            Change::Remove(device) if functions.contains_key(&device) => {
                self.remove_function(&mut functions, &device).await
            }
            Change::Remove(device) => self.remove(&device).await,
        }
    }

    async fn status(&self) -> Result<Status, Why> {
        self.link.status(VMM_WITHIN).await.map_err(|error| error_chain(&error))
    }

    async fn errand(&self, errand: Errand) -> Result<(), Why> {
        self.errands.send(errand).await.map_err(|_gone| ending())
    }

    /// Waits until all that happened so far is seen to.
    async fn settled(&self) {
        let (answer, answered) = oneshot::channel();
        if self.errand(Errand::Settle(answer)).await.is_err() || answered.await.is_err() {
            log::debug!("the sandbox ends");
        }
    }

    fn request(&self, address: PciAddress, purpose: Purpose) -> DeviceRequest {
        DeviceRequest {
            container_id: self.container.clone(),
            pci_address: address.to_string(),
            purpose: Some(purpose),
            ..DeviceRequest::default()
        }
    }
}

fn ending() -> Why {
    "the sandbox is coming to its end".to_owned()
}

fn words(error: &VmmError) -> Why {
    error_chain(error)
}

/// What the agent does with a device. A nic's addresses are not known here.
///
/// # Errors
///
/// Fails for a device that a sandbox can't be without.
fn purpose(device: &DevicePlan) -> Result<Purpose, Why> {
    match device {
        DevicePlan::Vsock { .. } => {
            Err("the sandbox can't be without it: it is the way to the guest's agent".to_owned())
        }
        DevicePlan::Share { place: None, .. } => {
            Err("the sandbox can't be without it: the container's root is on it".to_owned())
        }
        DevicePlan::Share { tag, read_only, place: Some(place), .. } => {
            Ok(Purpose::Share(ShareUse {
                tag: tag.clone(),
                container_path: place.to_string_lossy().into_owned(),
                read_only: *read_only,
                mount_point: plan::mount_point(tag),
                ..ShareUse::default()
            }))
        }
        DevicePlan::Disk { serial, read_only, .. } => Ok(Purpose::Disk(DiskUse {
            container_path: format!("/dev/{serial}"),
            read_only: *read_only,
            ..DiskUse::default()
        })),
        DevicePlan::Network { interface, .. } => {
            let interface = Interface { name: interface.clone(), ..Interface::default() };
            Ok(nic(interface, Vec::new()))
        }
    }
}

fn nic(interface: Interface, routes: Vec<Route>) -> Purpose {
    Purpose::Interface(InterfaceUse {
        interface: Some(interface).into(),
        routes,
        ..InterfaceUse::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{SandboxPlan, tests::config, tests::facts};

    #[test]
    fn the_root_and_the_way_to_the_agent_stay_and_all_else_can_go() {
        let plan = SandboxPlan::new(config(), &facts()).unwrap();
        let can_go: Vec<&str> = plan
            .devices
            .iter()
            .filter(|device| purpose(device).is_ok())
            .map(DevicePlan::id)
            .collect();
        assert_eq!(can_go, ["volume-0", "disk-0", "net"]);
        let why = |id| purpose(plan.devices.iter().find(|device| device.id() == id).unwrap());
        assert!(why("vsock").unwrap_err().ends_with("it is the way to the guest's agent"));
        assert!(why("rootfs").unwrap_err().ends_with("the container's root is on it"));
    }

    #[test]
    fn a_share_is_found_where_it_was_mounted() {
        let plan = SandboxPlan::new(config(), &facts()).unwrap();
        let share = plan.devices.iter().find(|device| device.id() == "volume-0").unwrap();
        let Ok(Purpose::Share(share)) = purpose(share) else { panic!("no share") };
        assert_eq!(share.container_path, "/mnt/data");
        assert!(plan.storages.iter().any(|storage| storage.mount_point == share.mount_point));
    }
}
