//! What the host wants done with a device, checked. Pure.

use std::path::{Component, Path, PathBuf};

use nacre_proto::{
    agent::{DeviceRequest, Function, Storage, device_request::Purpose},
    pci::PciAddress,
};

use crate::{
    devices::{function::FunctionRequest, give::GiveError},
    ids::ContainerId,
    sandbox::{network::Network, storage::StoragePlan},
};

/// What becomes of a device.
#[derive(Clone, Debug)]
pub(crate) enum Use {
    /// A disk that is a node of the container.
    Disk { path: PathBuf, read_only: bool },
    /// A share that is mounted in the guest and from there in the container.
    Share { storage: Box<StoragePlan>, path: PathBuf },
    /// An interface.
    Interface { network: Network, name: String },
    /// A device of the host's: whatever a driver makes of it.
    Function(FunctionRequest),
}

/// A device and what becomes of it.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) container: ContainerId,
    pub(crate) address: PciAddress,
    pub(crate) purpose: Use,
}

fn invalid(what: &'static str, value: &str) -> GiveError {
    GiveError::Invalid { what, value: value.to_owned() }
}

impl Order {
    /// Checks what the host gave.
    pub(crate) fn parse(request: DeviceRequest) -> Result<Self, GiveError> {
        let container = ContainerId::parse(&request.container_id)
            .map_err(|_error| invalid("no container:", &request.container_id))?;
        let address = request.pci_address.parse();
        let address = address.map_err(|_error| invalid("no address:", &request.pci_address))?;
        let purpose = match request.purpose {
            Some(Purpose::Disk(disk)) => {
                Use::Disk { path: inside(&disk.container_path)?, read_only: disk.read_only }
            }
            Some(Purpose::Share(share)) => {
                let storage = Storage {
                    driver: "virtiofs".to_owned(),
                    source: share.tag,
                    mount_point: share.mount_point,
                    options: share.read_only.then(|| "ro".to_owned()).into_iter().collect(),
                    ..Storage::new()
                };
                let storage = StoragePlan::parse_all(&[storage])?;
                let storage = storage.into_iter().next();
                let storage = storage.ok_or_else(|| invalid("no share:", ""))?;
                Use::Share { storage: Box::new(storage), path: inside(&share.container_path)? }
            }
            Some(Purpose::Interface(interface)) => {
                let plan = interface.interface.into_option().unwrap_or_default();
                let name = plan.name.clone();
                // An interface that is to go needs no more than its name.
                let interfaces = if plan.mac.is_empty() { Vec::new() } else { vec![plan] };
                let network = Network::parse(&interfaces, &interface.routes)?;
                Use::Interface { network, name }
            }
            Some(Purpose::Function(function)) => {
                let function = Function {
                    pci_address: request.pci_address,
                    addresses: function.addresses,
                    ..Function::new()
                };
                Use::Function(FunctionRequest::parse(&function)?)
            }
            _ => return Err(invalid("no purpose of a device:", "")),
        };
        Ok(Self { container, address, purpose })
    }
}

/// A path of a container, without a way out.
fn inside(path: &str) -> Result<PathBuf, GiveError> {
    let parsed = Path::new(path);
    let is_plain =
        parsed.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let is_long = path.len() >= 1024;
    if parsed.is_absolute() && is_plain && !is_long && parsed.parent().is_some() {
        Ok(parsed.to_path_buf())
    } else {
        Err(invalid("no path of a container:", path))
    }
}

#[cfg(test)]
mod tests {
    use nacre_proto::agent::{DiskUse, FunctionUse, ShareUse};

    use super::*;

    fn parsed(purpose: Option<Purpose>) -> Result<Order, GiveError> {
        Order::parse(DeviceRequest {
            container_id: "web".to_owned(),
            pci_address: "0000:00:05.0".to_owned(),
            purpose,
            ..DeviceRequest::new()
        })
    }

    fn disk(path: &str) -> Option<Purpose> {
        let container_path = path.to_owned();
        Some(Purpose::Disk(DiskUse { container_path, ..DiskUse::new() }))
    }

    fn share(mount_point: &str) -> Option<Purpose> {
        Some(Purpose::Share(ShareUse {
            tag: "volume-1".to_owned(),
            container_path: "/mnt".to_owned(),
            mount_point: mount_point.to_owned(),
            ..ShareUse::new()
        }))
    }

    #[test]
    fn each_purpose_is_understood() {
        assert!(matches!(parsed(disk("/dev/disk-1")).unwrap().purpose, Use::Disk { .. }));
        let order = parsed(share("/run/nacre/volumes/1")).unwrap();
        assert!(matches!(order.purpose, Use::Share { .. }));
        let order = parsed(Some(Purpose::Function(FunctionUse::new()))).unwrap();
        assert!(matches!(order.purpose, Use::Function(_)));
    }

    #[test]
    fn paths_that_lead_elsewhere_and_purposes_that_are_none_are_refused() {
        for path in ["", "/", "dev/x", "/dev/../etc/x"] {
            assert!(parsed(disk(path)).is_err(), "{path:?}");
        }
        assert!(parsed(share("/etc")).is_err() && parsed(share("")).is_err());
        assert!(parsed(None).is_err());
    }
}
