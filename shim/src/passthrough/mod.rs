//! Devices of the host that a sandbox is given as they are, by VFIO.
//!
//! ```text
//! Function (typed) -- check: is it there, is the host done with it, is its group viable
//!                  -- bind:  taken from its driver, if asked, and written down first
//!                  -- open:  container, group and device, tied together, for the VMM
//!                  ...       the VMM ends: the kernel resets the device
//!                  -- give back: to the driver that it had, by whoever finds it written down
//! ```
//!
//! What was bound is in the sandbox's record before it is bound, so that a supervisor that dies
//! leaves nothing that `nacre rm`, or the next sandbox, can't give back.

pub mod binding;
mod host;
mod in_use;
pub mod memlock;

use std::{io, path::PathBuf, str::FromStr};

use vfio::{GroupError, HostAddress, HostAddressError, Opened, group::DRIVER};

pub use binding::Binding;
pub use host::Host;

/// A device of the host's that a guest is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is on the host.
    pub address: HostAddress,
    /// Whether it may be taken from the driver that it has.
    pub bind: bool,
    /// The addresses, in CIDR notation, that the guest gives to the interfaces that it is.
    pub ip: Vec<String>,
}

/// A text that describes no device.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// Another kind of device.
    #[error("`{0}` is no device: vfio:ADDRESS[,bind][,ip=ADDRESS/BITS] is expected")]
    Kind(String),
    /// No address.
    #[error("which device")]
    Address(#[from] HostAddressError),
    /// Another option.
    #[error("`{0}` is no option of a device: bind and ip=ADDRESS/BITS are")]
    Option(String),
}

impl FromStr for Function {
    type Err = FunctionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let kind = || FunctionError::Kind(text.to_owned());
        let mut words = text.strip_prefix("vfio:").ok_or_else(kind)?.split(',');
        let address = words.next().unwrap_or_default().parse()?;
        let mut function = Self { address, bind: false, ip: Vec::new() };
        for word in words {
            match word.split_once('=') {
                None if word == "bind" => function.bind = true,
                Some(("ip", cidr)) if !cidr.is_empty() => function.ip.push(cidr.to_owned()),
                _ => return Err(FunctionError::Option(word.to_owned())),
            }
        }
        Ok(function)
    }
}

/// Why a device can't be given to a guest.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// The device, its group or the host's IOMMU stands in the way.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The host works with it.
    #[error("device {address} is in use by the host: {how}")]
    InUse {
        /// Which.
        address: HostAddress,
        /// In what way.
        how: String,
    },
    /// Nothing to bind it to.
    #[error("the host has no driver {DRIVER}: load the module (modprobe {DRIVER})")]
    NoDriver,
    /// sysfs refuses.
    #[error("can't write {text:?} to {}", path.display())]
    Write {
        /// What.
        text: String,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// sysfs takes it, and nothing happens.
    #[error("the driver {driver} does not take device {address}")]
    NotTaken {
        /// Which.
        address: HostAddress,
        /// The driver.
        driver: String,
    },
    /// Two that one sandbox can't have side by side.
    #[error("devices {0} and {1} are in the same IOMMU group: a sandbox can have one of a group")]
    SameGroup(HostAddress, HostAddress),
    /// Memory can't be held in place.
    #[error(
        "can't let the VMM lock {needed} bytes of memory, which a device needs (RLIMIT_MEMLOCK is \
         {limit}): raise it (ulimit -l), or give nacre CAP_SYS_RESOURCE"
    )]
    Memlock {
        /// How much.
        needed: u64,
        /// What is allowed.
        limit: u64,
        /// Why it can't be more.
        source: io::Error,
    },
}

/// Checks that all of `functions` are there, can be given away once they are bound, and are not two
/// of a group. Changes nothing.
///
/// # Errors
///
/// Fails with the first thing that stands in the way.
pub fn check(host: &Host, functions: &[Function]) -> Result<(), PassthroughError> {
    let mut groups: Vec<(u32, HostAddress)> = Vec::new();
    for function in functions {
        let address = function.address;
        let group = host.sysfs().group(address)?;
        if let Some((_, other)) = groups.iter().find(|(number, _)| *number == group.number) {
            return Err(PassthroughError::SameGroup(*other, address));
        }
        groups.push((group.number, address));
        let mut group = group;
        if function.bind {
            binding::as_if_bound(&mut group, address);
        }
        group.check(address)?;
        if host.sysfs().driver(address)?.as_deref() != Some(DRIVER)
            && let Some(how) = in_use::by_host(host, address)
        {
            return Err(PassthroughError::InUse { address, how });
        }
    }
    Ok(())
}

/// Opens a device that is bound.
///
/// # Errors
///
/// Fails with what stands in the way.
pub fn open(host: &Host, address: HostAddress) -> Result<Opened, PassthroughError> {
    Ok(vfio::group::open(&host.sysfs(), address)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_an_address_and_options() {
        let function: Function = "vfio:0000:01:00.0,bind,ip=10.0.0.2/24".parse().unwrap();
        assert_eq!(function.address.to_string(), "0000:01:00.0");
        assert!(function.bind);
        assert_eq!(function.ip, ["10.0.0.2/24"]);
        let function: Function = "vfio:01:00.1".parse().unwrap();
        assert!(!function.bind && function.ip.is_empty());
        for text in ["0000:01:00.0", "vfio:", "vfio:01:00", "vfio:01:00.0,", "vfio:01:00.0,ip="] {
            assert!(text.parse::<Function>().is_err(), "{text}");
        }
    }

    #[test]
    fn two_of_a_group_and_one_whose_group_the_host_uses_are_refused() {
        let (_root, host) = host::tests::tree(&[
            ("0000:01:00.0", 7, Some(DRIVER)),
            ("0000:01:00.1", 7, Some(DRIVER)),
            ("0000:02:00.0", 8, Some("nvme")),
            ("0000:02:00.1", 8, Some("nvme")),
            ("0000:03:00.0", 9, Some("nvme")),
        ]);
        let check = |text: &[&str]| {
            let functions: Vec<_> = text.iter().map(|text| text.parse().unwrap()).collect();
            check(&host, &functions)
        };
        check(&["vfio:01:00.0", "vfio:03:00.0,bind"]).unwrap();
        let error = check(&["vfio:01:00.0", "vfio:01:00.1"]).unwrap_err();
        assert!(matches!(error, PassthroughError::SameGroup(..)), "{error}");
        let error = check(&["vfio:02:00.0,bind"]).unwrap_err().to_string();
        assert!(error.contains("0000:02:00.1 has the driver nvme"), "{error}");
        let error = check(&["vfio:03:00.0"]).unwrap_err();
        assert!(matches!(error, PassthroughError::Group(GroupError::NotBound { .. })), "{error}");
    }
}
