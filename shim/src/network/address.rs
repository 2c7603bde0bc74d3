//! The address plan: each sandbox has four addresses of 10.88.0.0 to 10.95.255.255, of which the
//! host has the first usable one and the guest the second. Pure but for reading the host's routes.

use std::{fs, net::Ipv4Addr};

use crate::record::NetworkRecord;

/// How many pairs there are: eight times 65,536 addresses, four each.
const PAIRS: u32 = 8 * 65_536 / 4;
const FIRST: u32 = 0x0a58_0000;
/// The prefix of a pair's network, in bits.
pub const PREFIX_BITS: u8 = 30;

/// Every pair overlaps with a route of the host or belongs to another sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no free network of four addresses in 10.88.0.0/13")]
pub struct NoneFree;

/// The addresses of one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    index: u32,
}

impl Pair {
    fn base(self) -> u32 {
        FIRST + self.index * 4
    }

    /// The host's address, the guest's gateway.
    #[must_use]
    pub fn host(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base() + 1)
    }

    /// The guest's address.
    #[must_use]
    pub fn guest(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base() + 2)
    }

    /// The name of the host's interface.
    #[must_use]
    pub fn tap(self) -> String {
        format!("nacre{}", self.index)
    }

    /// The guest's hardware address: locally administered, made from its IP address, so unique on
    /// the host.
    #[must_use]
    pub fn mac(self) -> String {
        self.mac_bytes().map(|byte| format!("{byte:02x}")).join(":")
    }

    /// The same as bytes.
    #[must_use]
    pub fn mac_bytes(self) -> [u8; 6] {
        let [a, b, c, d] = self.guest().octets();
        [0x02, 0x4e, a, b, c, d]
    }

    /// What is recorded before anything of it exists.
    #[must_use]
    pub fn record(self) -> NetworkRecord {
        NetworkRecord {
            index: self.index,
            tap: self.tap(),
            guest: self.guest(),
            firewall: None,
            forwarding: None,
        }
    }
}

/// A network that the host has a route to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Its address.
    pub destination: u32,
    /// Its mask; 0 is the default route.
    pub mask: u32,
}

/// The first pair that is neither in `taken` nor overlaps one of `routes`.
///
/// # Errors
///
/// Fails if there is none.
pub fn free_pair(taken: &[u32], routes: &[Route]) -> Result<Pair, NoneFree> {
    let overlaps = |pair: Pair| {
        let pair_mask = u32::MAX << (32 - PREFIX_BITS);
        let overlap = |route: &Route| {
            let mask = route.mask & pair_mask;
            route.mask != 0 && pair.base() & mask == route.destination & mask
        };
        routes.iter().any(overlap)
    };
    (0..PAIRS)
        .filter(|index| !taken.contains(index))
        .map(|index| Pair { index })
        .find(|pair| !overlaps(*pair))
        .ok_or(NoneFree)
}

/// The host's IPv4 routes, as far as the kernel tells.
#[must_use]
pub fn host_routes() -> Vec<Route> {
    parse_routes(&fs::read_to_string("/proc/net/route").unwrap_or_default())
        .into_iter()
        .map(|(_, route)| route)
        .collect()
}

/// The interface of the host's default route, if it has one.
#[must_use]
pub fn uplink() -> Option<String> {
    parse_routes(&fs::read_to_string("/proc/net/route").unwrap_or_default())
        .into_iter()
        .find_map(|(interface, route)| (route.mask == 0).then_some(interface))
}

/// Reads /proc/net/route: interface, destination, gateway, flags, three counters, mask, ...; the
/// addresses are hexadecimal in the order of the host's bytes.
fn parse_routes(text: &str) -> Vec<(String, Route)> {
    let address = |hex: &str| u32::from_str_radix(hex, 16).ok().map(u32::from_be);
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [interface, destination, _, _, _, _, _, mask, ..] = fields[..] else { return None };
        let route = Route { destination: address(destination)?, mask: address(mask)? };
        Some((interface.to_owned(), route))
    };
    text.lines().skip(1).filter_map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0102000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
pod0\t0000580A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
";

    #[test]
    fn the_routes_of_the_kernel_are_read() {
        let routes = parse_routes(ROUTES);
        assert_eq!(routes[0], ("eth0".to_owned(), Route { destination: 0, mask: 0 }));
        let pod = Route { destination: 0x0a58_0000, mask: 0xffff_0000 };
        assert_eq!(routes[1], ("pod0".to_owned(), pod));
    }

    #[test]
    fn the_first_pair_has_the_documented_addresses() {
        let pair = free_pair(&[], &[]).unwrap();
        assert_eq!(pair.host(), Ipv4Addr::new(10, 88, 0, 1));
        assert_eq!(pair.guest(), Ipv4Addr::new(10, 88, 0, 2));
        assert_eq!((pair.tap().as_str(), pair.mac().as_str()), ("nacre0", "02:4e:0a:58:00:02"));
    }

    #[test]
    fn taken_pairs_and_routed_networks_are_skipped() {
        assert_eq!(free_pair(&[0, 1], &[]).unwrap().index, 2);
        let routes: Vec<Route> = parse_routes(ROUTES).into_iter().map(|(_, route)| route).collect();
        assert_eq!(free_pair(&[], &routes).unwrap().host(), Ipv4Addr::new(10, 89, 0, 1));
        let all = Route { destination: 0x0a00_0000, mask: 0xff00_0000 };
        assert_eq!(free_pair(&[], &[all]), Err(NoneFree));
    }
}
