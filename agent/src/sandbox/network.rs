//! The guest's network, as the host describes it: interfaces by hardware address, then routes.

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::{Duration, Instant},
};

use nacre_proto::agent::{Interface, Route};
use tokio::{
    task::{JoinError, spawn_blocking},
    time::sleep,
};

use crate::sandbox::netlink::{KernelRoute, LinkChange, Netlink};

pub(super) const DEVICES: &str = "/sys/class/net";
/// How long an interface may take to appear after the host attached it.
const APPEAR_LIMIT: Duration = Duration::from_secs(10);
const INTERFACES_MAX: usize = 32;
const ADDRESSES_MAX: usize = 64;
const ROUTES_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 15;

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// Makes no sense.
    #[error("no {what}: {value:?}")]
    Invalid {
        /// What.
        what: &'static str,
        /// As given.
        value: String,
    },
    /// Too many.
    #[error("{count} {what}: at most {max} are allowed")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// And how many are allowed.
        max: usize,
    },
    /// It did not appear.
    #[error("no interface with the address {mac} appeared within {} s", APPEAR_LIMIT.as_secs())]
    NoDevice {
        /// Which.
        mac: String,
    },
    /// The kernel refuses.
    #[error("can't {0}")]
    Kernel(String, #[source] io::Error),
    /// The work was given up.
    #[error("the set-up was cut short")]
    Cut(#[source] JoinError),
}

/// An interface, checked.
#[derive(Clone, Debug)]
struct InterfacePlan {
    /// Lower case, as the kernel writes it.
    mac: String,
    name: String,
    /// Absent: the device's own.
    mtu: Option<u32>,
    addresses: Vec<(IpAddr, u8)>,
}

/// A route, checked.
#[derive(Clone, Debug)]
struct RoutePlan {
    destination: (IpAddr, u8),
    gateway: Option<IpAddr>,
    interface: String,
}

/// Everything about the network.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    interfaces: Vec<InterfacePlan>,
    routes: Vec<RoutePlan>,
}

pub(super) fn invalid(what: &'static str, value: &str) -> NetworkError {
    NetworkError::Invalid { what, value: value.to_owned() }
}

pub(super) fn limited(what: &'static str, count: usize, max: usize) -> Result<(), NetworkError> {
    if count <= max { Ok(()) } else { Err(NetworkError::TooMany { what, count, max }) }
}

impl Network {
    /// Checks what the host gave.
    pub(crate) fn parse(interfaces: &[Interface], routes: &[Route]) -> Result<Self, NetworkError> {
        limited("interfaces", interfaces.len(), INTERFACES_MAX)?;
        limited("routes", routes.len(), ROUTES_MAX)?;
        Ok(Self {
            interfaces: interfaces.iter().map(InterfacePlan::parse).collect::<Result<_, _>>()?,
            routes: routes.iter().map(RoutePlan::parse).collect::<Result<_, _>>()?,
        })
    }

    /// Sets it up.
    pub(crate) async fn apply(&self) -> Result<(), NetworkError> {
        let mut indices = HashMap::new();
        for interface in &self.interfaces {
            let index = appeared(&interface.mac).await?;
            indices.insert(interface.name.clone(), index);
        }
        let network = self.clone();
        spawn_blocking(move || network.tell_kernel(&indices)).await.map_err(NetworkError::Cut)?
    }

    fn tell_kernel(&self, indices: &HashMap<String, u32>) -> Result<(), NetworkError> {
        let netlink = connect()?;
        // Out of each other's way first: two interfaces may be there under each other's names.
        for index in indices.values() {
            netlink
                .change_link(*index, LinkChange::Name(format!("nacre{index}")))
                .map_err(|source| NetworkError::Kernel("rename an interface".to_owned(), source))?;
        }
        for interface in &self.interfaces {
            let index = indices.get(&interface.name).copied().unwrap_or_default();
            interface.tell_kernel(&netlink, index)?;
        }
        for route in &self.routes {
            let interface_index = match indices.get(&route.interface) {
                Some(index) => *index,
                None => index_of(&Path::new(DEVICES).join(&route.interface))
                    .ok_or_else(|| invalid("interface", &route.interface))?,
            };
            let RoutePlan { destination, gateway, .. } = route.clone();
            netlink.add_route(&KernelRoute { destination, gateway, interface_index }).map_err(
                |source| NetworkError::Kernel(format!("add the route {route:?}"), source),
            )?;
        }
        Ok(())
    }
}

impl InterfacePlan {
    fn parse(interface: &Interface) -> Result<Self, NetworkError> {
        let mac = interface.mac.to_ascii_lowercase();
        let groups: Vec<_> = mac.split(':').collect();
        let is_group =
            |group: &&str| group.len() == 2 && group.bytes().all(|byte| byte.is_ascii_hexdigit());
        if groups.len() != 6 || !groups.iter().all(is_group) {
            return Err(invalid("hardware address", &interface.mac));
        }
        limited("addresses", interface.addresses.len(), ADDRESSES_MAX)?;
        let addresses = interface.addresses.iter().map(|text| cidr(text));
        Ok(Self {
            name: name(&interface.name)?,
            mtu: Some(interface.mtu).filter(|mtu| *mtu != 0),
            addresses: addresses.collect::<Result<_, _>>()?,
            mac,
        })
    }

    fn tell_kernel(&self, netlink: &Netlink, index: u32) -> Result<(), NetworkError> {
        let failed = |what: &str| {
            let what = format!("{what} {}", self.name);
            move |source| NetworkError::Kernel(what, source)
        };
        // Still down, so that it can be renamed.
        netlink
            .change_link(index, LinkChange::Name(self.name.clone()))
            .map_err(failed("name the interface"))?;
        if let Some(mtu) = self.mtu {
            netlink.change_link(index, LinkChange::Mtu(mtu)).map_err(failed("set the MTU of"))?;
        }
        for (address, prefix) in &self.addresses {
            netlink
                .add_address(index, *address, *prefix)
                .map_err(failed(&format!("give {address}/{prefix} to")))?;
        }
        netlink.change_link(index, LinkChange::Up).map_err(failed("set up"))
    }
}

impl RoutePlan {
    fn parse(route: &Route) -> Result<Self, NetworkError> {
        let gateway = match route.gateway.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_error| invalid("gateway", text))?),
        };
        let destination = match (route.destination.as_str(), gateway) {
            ("", Some(IpAddr::V6(_))) => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
            ("", _) => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            (text, _) => cidr(text)?,
        };
        if gateway.is_some_and(|gateway| gateway.is_ipv6() != destination.0.is_ipv6()) {
            return Err(invalid("gateway of the destination's family", &route.gateway));
        }
        Ok(Self { destination, gateway, interface: name(&route.interface)? })
    }
}

/// Sets lo up.
pub(crate) fn raise_loopback() -> Result<(), NetworkError> {
    let index =
        index_of(&Path::new(DEVICES).join("lo")).ok_or_else(|| invalid("interface", "lo"))?;
    connect()?
        .change_link(index, LinkChange::Up)
        .map_err(|source| NetworkError::Kernel("set up lo".to_owned(), source))
}

fn connect() -> Result<Netlink, NetworkError> {
    Netlink::new()
        .map_err(|source| NetworkError::Kernel("open a netlink socket".to_owned(), source))
}

/// Gives addresses to an interface that is there, by its name, and sets it up.
pub(crate) async fn set_up(name: String, addresses: Vec<(IpAddr, u8)>) -> Result<(), NetworkError> {
    let index = index_of(&Path::new(DEVICES).join(&name));
    let index = index.ok_or_else(|| invalid("interface", &name))?;
    let plan = InterfacePlan { mac: String::new(), name, mtu: None, addresses };
    spawn_blocking(move || plan.tell_kernel(&connect()?, index)).await.map_err(NetworkError::Cut)?
}

async fn appeared(mac: &str) -> Result<u32, NetworkError> {
    let deadline = Instant::now() + APPEAR_LIMIT;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(index) = find(Path::new(DEVICES), mac) {
            return Ok(index);
        }
        if Instant::now() > deadline {
            return Err(NetworkError::NoDevice { mac: mac.to_owned() });
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn find(devices: &Path, mac: &str) -> Option<u32> {
    let has_mac = |device: &Path| {
        fs::read_to_string(device.join("address")).is_ok_and(|found| found.trim() == mac)
    };
    let devices = fs::read_dir(devices).ok()?.flatten().map(|entry| entry.path());
    devices.filter(|device| has_mac(device)).find_map(|device| index_of(&device))
}

pub(super) fn index_of(device: &Path) -> Option<u32> {
    fs::read_to_string(device.join("ifindex")).ok()?.trim().parse().ok()
}

pub(super) fn name(name: &str) -> Result<String, NetworkError> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    let is_name = (1..=NAME_BYTES_MAX).contains(&name.len()) && !matches!(name, "." | "..");
    if is_name && name.bytes().all(allowed) {
        Ok(name.to_owned())
    } else {
        Err(invalid("name of an interface", name))
    }
}

/// An address and the length of its prefix.
pub(crate) fn cidr(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= bits).then_some((address, prefix))
    });
    parsed.ok_or_else(|| invalid("address in CIDR notation", text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(mac: &str, name: &str, address: &str) -> Interface {
        Interface {
            mac: mac.to_owned(),
            name: name.to_owned(),
            addresses: vec![address.to_owned()],
            ..Interface::new()
        }
    }

    #[test]
    fn hardware_addresses_are_compared_as_the_kernel_writes_them() {
        let plan =
            InterfacePlan::parse(&interface("02:AB:00:00:00:01", "eth0", "10.0.0.2/24")).unwrap();
        assert_eq!(plan.mac, "02:ab:00:00:00:01");
        assert_eq!(plan.addresses, [(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)), 24)]);
    }

    #[test]
    fn odd_interfaces_are_refused() {
        let mac = "02:00:00:00:00:01";
        for (mac, name, address) in [
            ("02:00", "eth0", "10.0.0.2/24"),
            ("02:00:00:00:00:zz", "eth0", "10.0.0.2/24"),
            (mac, "a/b", "10.0.0.2/24"),
            (mac, "", "10.0.0.2/24"),
            (mac, "sixteen-letters-", "10.0.0.2/24"),
            (mac, "eth0", "10.0.0.2"),
            (mac, "eth0", "10.0.0.2/33"),
        ] {
            let interface = interface(mac, name, address);
            assert!(InterfacePlan::parse(&interface).is_err(), "{interface:?}");
        }
    }

    #[test]
    fn an_empty_destination_is_the_default_route_of_the_gateways_family() {
        let route = |gateway: &str| Route {
            gateway: gateway.to_owned(),
            interface: "eth0".to_owned(),
            ..Route::new()
        };
        assert_eq!(RoutePlan::parse(&route("10.0.0.1")).unwrap().destination.1, 0);
        assert!(RoutePlan::parse(&route("fe80::1")).unwrap().destination.0.is_ipv6());
        assert!(RoutePlan::parse(&route("nowhere")).is_err());
    }
}
