//! A device of the host's that a container is to have: its disks as nodes, its interfaces set up.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nacre_proto::{
    agent::Function,
    pci::{NoPciAddress, PciAddress},
};
use tokio::time::sleep;

use crate::{
    container::spec::DiskNode,
    devices::found::{DeviceError, PCI_DEVICES, Part, appeared, folder},
    sandbox::network::{NetworkError, cidr, set_up},
};

/// How long a driver may take: the controller has to come up, which is slow on an emulated host.
const DRIVER_LIMIT: Duration = Duration::from_secs(30);
/// The pause between two looks for a device that was just added.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const FUNCTIONS_MAX: usize = 32;
/// Base classes of PCI (PCI Code and ID Assignment Specification, section 1).
const MASS_STORAGE: u32 = 0x01;
const NETWORK: u32 = 0x02;

/// Why a device of the host's can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FunctionError {
    /// No address.
    #[error(transparent)]
    Address(#[from] NoPciAddress),
    /// It does not come.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Its interface can't be set up, or what it is to have is no address.
    #[error("the interface of the device at {0}")]
    Interface(PciAddress, #[source] NetworkError),
    /// Too many.
    #[error("{0} devices of the host's: at most {FUNCTIONS_MAX} are allowed")]
    TooMany(usize),
}

/// What the host asks for, checked.
#[derive(Clone, Debug)]
pub(crate) struct FunctionRequest {
    address: PciAddress,
    interface_addresses: Vec<(IpAddr, u8)>,
}

impl FunctionRequest {
    /// Checks what the host gave.
    pub(crate) fn parse_all(given: &[Function]) -> Result<Vec<Self>, FunctionError> {
        if given.len() > FUNCTIONS_MAX {
            return Err(FunctionError::TooMany(given.len()));
        }
        given.iter().map(Self::parse).collect()
    }

    /// Checks one.
    ///
    /// # Errors
    ///
    /// Fails if an address makes no sense.
    pub(crate) fn parse(given: &Function) -> Result<Self, FunctionError> {
        let address = given.pci_address.parse()?;
        let addresses = given.addresses.iter().map(|text| cidr(text));
        let interface_addresses = addresses
            .collect::<Result<_, _>>()
            .map_err(|source| FunctionError::Interface(address, source))?;
        Ok(Self { address, interface_addresses })
    }
}

/// Waits for what drivers make of the devices; sets interfaces up, and answers the nodes of disks.
pub(crate) async fn nodes(requests: &[FunctionRequest]) -> Result<Vec<DiskNode>, FunctionError> {
    let mut nodes = Vec::new();
    for FunctionRequest { address, interface_addresses } in requests {
        let parts = parts_of(*address).await?;
        nodes.extend(parts.iter().filter_map(node));
        for part in parts.iter().filter(|part| part.subsystem == "net") {
            log::info!("the device at {address} is the interface {}", part.name);
            if !interface_addresses.is_empty() {
                let done = set_up(part.name.clone(), interface_addresses.clone()).await;
                done.map_err(|source| FunctionError::Interface(*address, source))?;
            }
        }
    }
    Ok(nodes)
}

/// What a device's class lets expect, once the kernel has taken notice of the device.
async fn parts_of(address: PciAddress) -> Result<Vec<Part>, DeviceError> {
    let device = folder(Path::new(PCI_DEVICES), address);
    let deadline = Instant::now() + DRIVER_LIMIT;
    let mut class = base_class(&device);
    while class.is_none() && Instant::now() < deadline {
        sleep(LOOK_EVERY).await;
        class = base_class(&device);
    }
    match class {
        Some(MASS_STORAGE) => appeared(address, &["block"], DRIVER_LIMIT).await,
        Some(NETWORK) => appeared(address, &["net"], DRIVER_LIMIT).await,
        Some(class) => {
            log::info!("the device at {address} has the class {class:#04x}: left to its driver");
            Ok(Vec::new())
        }
        None => Err(DeviceError::NotThere { address, limit: DRIVER_LIMIT }),
    }
}

/// The file has the class code, three bytes, of which the first is the base class.
fn base_class(device: &Path) -> Option<u32> {
    let text = fs::read_to_string(device.join("class")).ok()?;
    let code = u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()?;
    Some(code >> 16)
}

/// The node of a disk, where the container sees it.
fn node(part: &Part) -> Option<DiskNode> {
    let (major, minor) = part.number.filter(|_| part.subsystem == "block")?;
    let path = PathBuf::from("/dev").join(&part.name);
    Some(DiskNode { path, major, minor, read_only: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_an_address_and_what_its_interfaces_get() {
        let given = |address: &str, ip: &str| Function {
            pci_address: address.to_owned(),
            addresses: vec![ip.to_owned()],
            ..Function::new()
        };
        let parsed = FunctionRequest::parse(&given("0000:00:05.0", "10.0.0.2/24")).unwrap();
        assert_eq!(parsed.interface_addresses.len(), 1);
        assert!(FunctionRequest::parse(&given("5.0", "10.0.0.2/24")).is_err());
        assert!(FunctionRequest::parse(&given("0000:00:05.0", "10.0.0.2")).is_err());
        let many = vec![given("0000:00:05.0", "10.0.0.2/24"); FUNCTIONS_MAX + 1];
        assert!(FunctionRequest::parse_all(&many).is_err());
    }

    #[test]
    fn the_class_is_the_first_of_three_bytes() {
        let device = tempfile::tempdir().unwrap();
        assert_eq!(base_class(device.path()), None);
        fs::write(device.path().join("class"), "0x010802\n").unwrap();
        assert_eq!(base_class(device.path()), Some(MASS_STORAGE));
    }

    #[test]
    fn only_a_disk_with_a_number_becomes_a_node() {
        let part = |subsystem: &str, number| Part {
            subsystem: subsystem.to_owned(),
            name: "nvme0n1".to_owned(),
            number,
        };
        let expected = DiskNode {
            path: PathBuf::from("/dev/nvme0n1"),
            major: 259,
            minor: 0,
            read_only: false,
        };
        assert_eq!(node(&part("block", Some((259, 0)))), Some(expected));
        assert_eq!(node(&part("block", None)), None);
        assert_eq!(node(&part("nvme", Some((240, 0)))), None);
    }
}
