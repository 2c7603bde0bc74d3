//! The host's side of a sandbox's network: a tap with an address, and a way out.
//!
//! The tap lives as long as its descriptor, so it can't outlive the sandbox's processes. The rules
//! and the forwarding switch can: they are recorded before they are made, and [`remove`] takes
//! them away by the record.

pub mod address;
pub mod firewall;
pub mod namespace;

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::fd::OwnedFd,
};

use crate::{
    record::{Firewall, NetworkRecord},
    registry::{Registration, RegistryError},
    sys,
};
use address::{PREFIX_BITS, Pair};

/// Why a sandbox gets no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The tap can't be made.
    #[error("can't make the tap interface {0}")]
    Tap(String, #[source] io::Error),
    /// A program of the host is missing.
    #[error("the program `{0}` is not installed, and a sandbox with a network needs it")]
    MissingProgram(&'static str),
    /// There is nothing to translate addresses with.
    #[error("neither `nft` nor `iptables` is installed, and a network with a way out needs one")]
    NoFirewall,
    /// A program of the host can't be run.
    #[error("can't run `{program}`")]
    Run {
        /// Which.
        program: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A program of the host failed.
    #[error("`{program} {arguments}` failed and said: {said}")]
    Failed {
        /// Which.
        program: &'static str,
        /// With what.
        arguments: String,
        /// The first line it printed.
        said: String,
    },
    /// A program of the host hangs.
    #[error("`{program} {arguments}` does not end: it was killed after {seconds} s")]
    Hung {
        /// Which.
        program: &'static str,
        /// With what.
        arguments: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Forwarding can't be switched on.
    #[error("can't switch on forwarding of {0}")]
    Forwarding(String, #[source] io::Error),
    /// A hardware address is none.
    #[error("`{0}` is no hardware address")]
    Mac(String),
    /// There is nothing to record it in.
    #[error("the sandbox is registered no more")]
    Unregistered,
    /// No address is free, or it can't be recorded.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// A network that is ready for its backend.
#[derive(Debug)]
pub struct Network {
    /// Its addresses.
    pub pair: Pair,
    /// Its end for the guest.
    pub nic: Nic,
}

/// What `nacre-net` serves a guest's nic with.
#[derive(Debug)]
pub struct Nic {
    /// The tap.
    pub tap: OwnedFd,
    /// The guest's hardware address.
    pub mac: [u8; 6],
}

impl Nic {
    /// With the hardware address that `mac` is the text of.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn with_mac(tap: OwnedFd, mac: &str) -> Result<Self, NetworkError> {
        let groups = mac.split(':').map(|group| u8::from_str_radix(group, 16).ok());
        let bytes = groups.collect::<Option<Vec<u8>>>().and_then(|bytes| bytes.try_into().ok());
        let mac = bytes.ok_or_else(|| NetworkError::Mac(mac.to_owned()))?;
        Ok(Self { tap, mac })
    }

    /// The hardware address as it is written.
    #[must_use]
    pub fn mac(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// Makes the network of a sandbox, or of a `device` that it is given while it runs. If it fails
/// half-way, the record says what is to be removed.
///
/// # Errors
///
/// Fails if no address is free or the host refuses.
pub fn create(
    registration: &mut Registration,
    device: Option<&str>,
) -> Result<Network, NetworkError> {
    let pair = registration.reserve_network(device)?;
    let name = pair.tap();
    let tap = sys::create_tap(&name).map_err(|source| NetworkError::Tap(name.clone(), source))?;
    let host = format!("{}/{PREFIX_BITS}", pair.host());
    firewall::run("ip", &["address", "add", &host, "dev", &name], "")?;
    firewall::run("ip", &["link", "set", "dev", &name, "up"], "")?;
    match address::uplink() {
        None => log::info!("the host has no default route: the sandbox reaches only the host"),
        Some(uplink) => let_out(registration, pair, &uplink)?,
    }
    Ok(Network { pair, nic: Nic { tap, mac: pair.mac_bytes() } })
}

fn let_out(registration: &mut Registration, pair: Pair, uplink: &str) -> Result<(), NetworkError> {
    let firewall = firewall::available()?;
    open_way(registration, &pair.tap(), uplink, firewall)?;
    switch_on(&pair.tap())?;
    firewall::add(firewall, &pair.tap(), pair.guest())
}

/// Records what lets the network of `tap` out, and switches on forwarding of `uplink`. Both under the
/// registry's lock, as [`Registration::release_networks`] undoes both: the last to end looks at the
/// switch and at the records.
fn open_way(
    registration: &mut Registration,
    tap: &str,
    uplink: &str,
    firewall: Firewall,
) -> Result<(), NetworkError> {
    let _lock = registration.lock()?;
    let was_on = fs::read_to_string(forwarding_switch(uplink))
        .map_err(|source| NetworkError::Forwarding(uplink.to_owned(), source))?
        .trim()
        != "0";
    // Whoever ends last switches it off, so each sandbox that depends on the switch records it.
    let ours = !was_on || registration.others_switched_on(uplink, tap)?;
    registration.update(|record| {
        if let Some(network) = record.network_mut(tap) {
            network.firewall = Some(firewall);
            network.forwarding = ours.then(|| uplink.to_owned());
        }
    })?;
    switch_on(uplink)
}

fn switch_on(interface: &str) -> Result<(), NetworkError> {
    fs::write(forwarding_switch(interface), "1")
        .map_err(|source| NetworkError::Forwarding(interface.to_owned(), source))
}

fn forwarding_switch(interface: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{interface}/forwarding")
}

/// Removes what outlives the processes of a sandbox, by its record. `other_users` is how many
/// other sandboxes need the host to forward packets.
pub fn remove(record: &NetworkRecord, other_users: usize) {
    if let Some(kind) = record.firewall {
        firewall::remove(kind, &record.tap, record.guest);
    }
    match &record.forwarding {
        Some(uplink) if other_users == 0 => {
            if let Err(error) = fs::write(forwarding_switch(uplink), "0") {
                log::warn!("can't switch off forwarding of {uplink}: {error}");
            }
        }
        Some(uplink) => log::debug!("forwarding of {uplink} stays on for {other_users} others"),
        None => {}
    }
}

/// The name servers that a guest can reach, from the host's configuration.
#[must_use]
pub fn nameservers() -> Vec<Ipv4Addr> {
    // systemd-resolved lists the real ones there and puts a loopback address into /etc.
    let files = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];
    let found = files
        .iter()
        .map(|file| parse_nameservers(&fs::read_to_string(file).unwrap_or_default()))
        .find(|servers| !servers.is_empty());
    found.unwrap_or_else(|| {
        log::warn!("the host names no name server that a sandbox could reach");
        Vec::new()
    })
}

fn parse_nameservers(text: &str) -> Vec<Ipv4Addr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse::<IpAddr>().ok())
        .filter_map(|address| match address {
            IpAddr::V4(address) if !address.is_loopback() => Some(address),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        })
        .take(3)
        .collect()
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
