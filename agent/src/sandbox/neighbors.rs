//! Entries of the neighbour table that the host gives, and that do not age.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use nacre_proto::agent::Neighbor;

use crate::sandbox::{
    netlink::{KernelNeighbor, Netlink},
    network::{DEVICES, NetworkError, index_of, invalid, limited, name},
};

const NEIGHBORS_MAX: usize = 1024;

/// An entry, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NeighborPlan {
    address: IpAddr,
    mac: [u8; 6],
    interface: String,
}

/// All entries.
#[derive(Clone, Debug)]
pub(crate) struct Neighbors(Vec<NeighborPlan>);

impl Neighbors {
    /// Checks what the host gave.
    pub(crate) fn parse(given: &[Neighbor]) -> Result<Self, NetworkError> {
        limited("neighbours", given.len(), NEIGHBORS_MAX)?;
        Ok(Self(given.iter().map(NeighborPlan::parse).collect::<Result<_, _>>()?))
    }

    /// Tells the kernel, when the interfaces are there.
    pub(crate) fn apply(&self) -> Result<(), NetworkError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let failed = |what: String| move |source| NetworkError::Kernel(what, source);
        let netlink = Netlink::new().map_err(failed("open a netlink socket".to_owned()))?;
        for plan in &self.0 {
            let device: PathBuf = Path::new(DEVICES).join(&plan.interface);
            let interface_index =
                index_of(&device).ok_or_else(|| invalid("interface", &plan.interface))?;
            let neighbor = KernelNeighbor { address: plan.address, mac: plan.mac, interface_index };
            let what = format!("add the neighbour {}", plan.address);
            netlink.add_neighbor(&neighbor).map_err(failed(what))?;
        }
        Ok(())
    }
}

impl NeighborPlan {
    fn parse(given: &Neighbor) -> Result<Self, NetworkError> {
        let address = given.address.parse();
        Ok(Self {
            address: address.map_err(|_error| invalid("address of a neighbour", &given.address))?,
            mac: mac(&given.mac).ok_or_else(|| invalid("hardware address", &given.mac))?,
            interface: name(&given.interface)?,
        })
    }
}

/// Six groups of two hexadecimal digits.
fn mac(text: &str) -> Option<[u8; 6]> {
    let byte = |group: &str| {
        let is_group = group.len() == 2 && group.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_group.then(|| u8::from_str_radix(group, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn neighbor(address: &str, mac: &str, interface: &str) -> Neighbor {
        Neighbor {
            address: address.to_owned(),
            mac: mac.to_owned(),
            interface: interface.to_owned(),
            ..Neighbor::new()
        }
    }

    #[test]
    fn an_entry_has_two_addresses_and_an_interface() {
        let given = [neighbor("fe80::1", "02:00:00:00:00:fF", "eth0")];
        let plan = &Neighbors::parse(&given).unwrap().0[0];
        assert_eq!((plan.mac, plan.interface.as_str()), ([2, 0, 0, 0, 0, 255], "eth0"));
        for bad in [
            neighbor("10.0.0", "02:00:00:00:00:01", "eth0"),
            neighbor("10.0.0.1", "02:00:00:00:01", "eth0"),
            neighbor("10.0.0.1", "02:00:00:00:00:+1", "eth0"),
            neighbor("10.0.0.1", "02:00:00:00:00:01", "../eth0"),
        ] {
            assert!(Neighbors::parse(&[bad]).is_err());
        }
    }
}
