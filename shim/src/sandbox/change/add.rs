//! A device for a sandbox that runs: its process, its place on the guest's bus, and in the container.
//!
//! ```text
//!  plan -> network, process ready -> VMM has it -> kept -> the agent has given it to the container
//! ```
//! What fails before the VMM has it is undone by dropping it; what fails after that, by removing the
//! device again.

use std::{
    os::fd::AsFd,
    path::{Component, Path, PathBuf},
};

use nacre_proto::{
    agent::device_request::Purpose,
    pci::PciAddress,
    supervisor::{Answer, NewDevice},
    vmm,
};
use tokio::sync::oneshot;

use crate::{
    backends::{Backend, VmmEnd},
    error_chain,
    network::{Network, address::Pair},
    plan::{DevicePlan, inputs},
    sandbox::{
        change::{Errand, Operator, VMM_WITHIN, Why, ending, nic, purpose, words},
        connect::interface,
    },
};

/// How many devices of a kind a sandbox may have.
const MOST_OF_A_KIND: usize = 1024;

impl Operator {
    pub(super) async fn add(&self, new: NewDevice) -> Answer {
        let taken = |id: &str| self.roster.find(id).is_some();
        let device = match planned(new, taken) {
            Ok(device) => device,
            Err(why) => return Answer::Refused(why),
        };
        match self.bring(&device).await {
            Ok((address, purpose)) => self.give(&device, address, purpose).await,
            Err(why) => {
                let id = device.id().to_owned();
                if let Err(why) = self.errand(Errand::EndNetwork(id)).await {
                    log::debug!("{why}");
                }
                Answer::Refused(why)
            }
        }
    }

    /// Puts the device on the guest's bus and has it kept.
    pub(super) async fn bring(&self, device: &DevicePlan) -> Result<(PciAddress, Purpose), Why> {
        let network = match device {
            DevicePlan::Network { id, .. } => Some(self.network(id).await?),
            _ => None,
        };
        let purpose = match (&network, device) {
            (Some(network), DevicePlan::Network { interface, .. }) => {
                self.nic(network.pair, interface)
            }
            _ => purpose(device)?,
        };
        let surroundings = self.surroundings.clone();
        let started =
            Backend::start(device, surroundings, network.as_ref().map(|network| &network.nic));
        let (mut backend, end) = started.map_err(|error| error_chain(&error))?;
        backend.ready().await.map_err(|error| error_chain(&error))?;
        let VmmEnd { id, config, socket, .. } = end;
        let new = vmm::NewDevice {
            id,
            kind: vmm::NewDeviceKind::Virtio {
                device_type: device.device_type(),
                queues: None,
                queue_size: None,
                config: Some(config).filter(|config| !config.is_empty()),
            },
        };
        let added = self.link.add_device(new, &[socket.as_fd()], VMM_WITHIN).await;
        let address = added.map_err(|error| words(&error))?;
        self.errand(Errand::Keep(Box::new(backend))).await?;
        // Only then can its handle be found.
        self.settled().await;
        Ok((address, purpose))
    }

    async fn network(&self, device: &str) -> Result<Network, Why> {
        let (answer, answered) = oneshot::channel();
        self.errand(Errand::MakeNetwork(device.to_owned(), answer)).await?;
        let made = answered.await.map_err(|_gone| ending())?;
        made.map_err(|error| error_chain(&error))
    }

    /// The first nic of a sandbox is its way out.
    fn nic(&self, pair: Pair, name: &str) -> Purpose {
        let is_first = !self
            .roster
            .all()
            .iter()
            .any(|handle| matches!(handle.device, DevicePlan::Network { .. }));
        let (interface, route) = interface(pair, name);
        nic(interface, if is_first { vec![route] } else { Vec::new() })
    }

    /// Has the agent give the device to the container.
    async fn give(&self, device: &DevicePlan, address: PciAddress, purpose: Purpose) -> Answer {
        match self.agent.attach(&self.request(address, purpose)).await {
            Ok(places) => Answer::Added {
                device: device.id().to_owned(),
                address: address.to_string(),
                places,
            },
            Err(error) => {
                let why = error_chain(&error);
                match self.take_off(device.id()).await {
                    Answer::Removed => Answer::Refused(why),
                    Answer::Kept(left) | Answer::Leaving(left) | Answer::Refused(left) => {
                        Answer::Leaving(format!("{why}; and it is still there: {left}"))
                    }
                    _ => Answer::Leaving(why),
                }
            }
        }
    }
}

/// What the device will be, if it can be.
pub(super) fn planned(new: NewDevice, taken: impl Fn(&str) -> bool) -> Result<DevicePlan, Why> {
    let free = |name: &dyn Fn(usize) -> String| {
        let mut names = (0..MOST_OF_A_KIND).map(name);
        names.find(|name| !taken(name)).ok_or_else(|| "there are too many of its kind".to_owned())
    };
    match new {
        NewDevice::Disk { path, read_only } => {
            let path = absolute("disk", path)?;
            inputs::disk(&path, read_only).map_err(|error| error_chain(&error))?;
            let serial = free(&|index| format!("disk-{index}"))?;
            Ok(DevicePlan::Disk { serial, path, read_only })
        }
        NewDevice::Share { path, guest, read_only } => {
            let path = absolute("volume", path)?;
            let place = Some(place(guest)?);
            inputs::volume(&path).map_err(|error| error_chain(&error))?;
            let tag = free(&|index| format!("volume-{index}"))?;
            Ok(DevicePlan::Share { tag, path, read_only, place, submounts: false })
        }
        NewDevice::Network => (0..MOST_OF_A_KIND)
            .map(DevicePlan::nic)
            .find(|device| !taken(device.id()))
            .ok_or_else(|| "there are too many of its kind".to_owned()),
        NewDevice::Vfio { .. } => Err("a device of the host's has no process".to_owned()),
    }
}

fn absolute(what: &str, path: String) -> Result<PathBuf, Why> {
    let parsed = PathBuf::from(path);
    if parsed.is_absolute() {
        return Ok(parsed);
    }
    Err(format!("{what} `{}` is not an absolute path", parsed.display()))
}

/// Where a container can have a share: below its root, by a path that says so itself.
fn place(guest: String) -> Result<PathBuf, Why> {
    let path = absolute("volume", guest)?;
    let is_plain =
        path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !is_plain || path == Path::new("/") {
        return Err(format!("a volume can't be mounted on the container's `{}`", path.display()));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn planned_beside(new: NewDevice, taken: &[&str]) -> Result<DevicePlan, Why> {
        planned(new, |id| taken.contains(&id))
    }

    #[test]
    fn a_new_device_has_the_first_free_name_of_its_kind() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        fs::write(&image, [0; 512]).unwrap();
        let disk =
            |path: &Path| NewDevice::Disk { path: path.display().to_string(), read_only: false };
        let taken = ["disk-0", "disk-2", "net", "volume-0"];
        assert_eq!(planned_beside(disk(&image), &taken).unwrap().id(), "disk-1");
        assert_eq!(planned_beside(NewDevice::Network, &taken).unwrap(), DevicePlan::nic(1));
        let share = |guest: &str| NewDevice::Share {
            path: folder.path().display().to_string(),
            guest: guest.to_owned(),
            read_only: true,
        };
        assert_eq!(planned_beside(share("/mnt"), &taken).unwrap().id(), "volume-1");
        for guest in ["mnt", "/", "/mnt/../..", ""] {
            assert!(planned_beside(share(guest), &[]).is_err(), "{guest}");
        }
        let missing = planned_beside(disk(&folder.path().join("x")), &[]).unwrap_err();
        assert!(missing.ends_with("No such file or directory (os error 2)"), "{missing}");
        assert!(planned_beside(disk(folder.path()), &[]).is_err());
        assert!(planned_beside(disk(Path::new("disk.img")), &[]).is_err());
    }
}
