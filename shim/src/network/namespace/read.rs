//! What `ip -j` says of a namespace, taken apart. Pure.

use nacre_proto::agent::{Interface, Neighbor, Route};
use serde::Deserialize;

use super::Found;

/// Why what `ip` printed can't be understood.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is no JSON of the expected kind.
    #[error("`ip` prints what is no list of {0}")]
    Json(&'static str, #[source] serde_json::Error),
}

#[derive(Deserialize)]
struct Link {
    ifname: String,
    #[serde(default)]
    link_type: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    addr_info: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    #[serde(default)]
    local: String,
    #[serde(default)]
    prefixlen: u8,
    #[serde(default)]
    scope: String,
}

#[derive(Deserialize)]
struct Way {
    dst: String,
    #[serde(default)]
    gateway: String,
    #[serde(default)]
    dev: String,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Near {
    dst: String,
    #[serde(default)]
    dev: String,
    #[serde(default)]
    lladdr: String,
}

fn parse<'a, T: Deserialize<'a>>(what: &'static str, text: &'a str) -> Result<Vec<T>, ReadError> {
    // A list of nothing is printed as nothing by some versions.
    let text = if text.trim().is_empty() { "[]" } else { text };
    serde_json::from_str(text).map_err(|source| ReadError::Json(what, source))
}

/// From `ip -j address show`, `ip -j route show` for each protocol, and `ip -j neigh show`.
pub(super) fn found(
    links: &str,
    routes: &[String; 2],
    neighbors: &str,
) -> Result<Found, ReadError> {
    let links: Vec<Link> = parse("interfaces", links)?;
    let interfaces: Vec<_> = links.iter().filter_map(interface).collect();
    let is_taken = |name: &str| interfaces.iter().any(|interface| interface.name == name);
    let mut ways = Vec::new();
    for text in routes {
        ways.extend(parse::<Way>("routes", text)?.into_iter().filter(|way| is_taken(&way.dev)));
    }
    // What a gateway is reached by comes before it, and the default route last.
    ways.sort_by_key(|way| (way.dst == "default", !way.gateway.is_empty()));
    let near: Vec<Near> = parse("neighbours", neighbors)?;
    let near = near.into_iter().filter(|near| is_taken(&near.dev) && !near.lladdr.is_empty());
    Ok(Found {
        routes: ways.iter().filter_map(route).collect(),
        neighbors: near.map(neighbor).collect(),
        interfaces,
    })
}

fn interface(link: &Link) -> Option<Interface> {
    // The others come with the interface.
    let is_global = |address: &&Address| address.scope == "global" && !address.local.is_empty();
    let addresses: Vec<_> = link
        .addr_info
        .iter()
        .filter(is_global)
        .map(|Address { local, prefixlen, .. }| format!("{local}/{prefixlen}"))
        .collect();
    let is_wanted = link.link_type == "ether" && !addresses.is_empty();
    is_wanted.then(|| Interface {
        mac: link.address.clone(),
        name: link.ifname.clone(),
        mtu: link.mtu,
        addresses,
        ..Interface::default()
    })
}

fn route(way: &Way) -> Option<Route> {
    // The kernel makes its own where the same address is given.
    let is_wanted = way.protocol != "kernel" && matches!(way.kind.as_str(), "" | "unicast");
    let destination = match way.dst.as_str() {
        "default" => String::new(),
        destination if destination.contains('/') => destination.to_owned(),
        address if address.contains(':') => format!("{address}/128"),
        address => format!("{address}/32"),
    };
    is_wanted.then(|| Route {
        destination,
        gateway: way.gateway.clone(),
        interface: way.dev.clone(),
        ..Route::default()
    })
}

fn neighbor(near: Near) -> Neighbor {
    Neighbor { address: near.dst, mac: near.lladdr, interface: near.dev, ..Neighbor::default() }
}
