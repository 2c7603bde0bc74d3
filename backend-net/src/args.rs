//! The command line of `nacre-net`, checked.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use backend_daemon::process::DaemonArgs;
use clap::Parser;

/// The most queue pairs that a device may have; the kernel's tap takes 256, no guest gains from
/// more than its vCPUs.
pub const MAX_QUEUE_PAIRS: u16 = 32;

/// A vhost-user network device on a tap interface.
#[derive(Debug, Parser)]
#[command(name = "nacre-net", version)]
pub struct Args {
    /// Use (or create) the tap interface of this name
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "tap_fd",
        required_unless_present_any = ["tap_fd", "print_capabilities"]
    )]
    pub tap: Option<InterfaceName>,
    /// Use these inherited tap or macvtap descriptors, one for each queue pair
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub tap_fd: Vec<RawFd>,
    /// The guest's Ethernet address; without it the guest chooses its own
    #[arg(long, value_name = "ADDRESS")]
    pub mac: Option<Mac>,
    /// The largest packet that the guest may send, in bytes without the Ethernet header
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    pub mtu: Option<u16>,
    /// How many pairs of a receive and a transmit queue there are
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUE_PAIRS)))]
    pub queue_pairs: u16,
    /// What all backends share
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

/// The name of a network interface: 1 to 15 bytes, as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceName(String);

/// Why a text names no interface.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is no interface name: 1 to 15 bytes without '/', ':', '%' or blanks")]
pub struct InterfaceNameError(String);

impl InterfaceName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // '%' would make the kernel number the name; the others it refuses.
        let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
        let dots = text == "." || text == "..";
        if (1..libc::IFNAMSIZ).contains(&text.len()) && text.bytes().all(allowed) && !dots {
            Ok(Self(text.to_owned()))
        } else {
            Err(InterfaceNameError(text.to_owned()))
        }
    }
}

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac([u8; 6]);

/// Why a text is no Ethernet address of a station.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is no Ethernet address of one station, such as 52:54:00:12:34:56")]
pub struct MacError(String);

impl Mac {
    /// The bytes as they go over the wire.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or_else(|| MacError(text.to_owned()))?;
        }
        let group = bytes[0] & 1 == 1;
        if parts.next().is_some() || group || bytes == [0; 6] {
            return Err(MacError(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        let base = ["nacre-net", "--socket-path", "/s"];
        Args::try_parse_from(base.iter().chain(words))
    }

    #[test]
    fn a_mac_is_six_pairs_of_digits_of_one_station() {
        assert_eq!("52:54:00:12:34:56".parse::<Mac>().unwrap().to_string(), "52:54:00:12:34:56");
        for wrong in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "1:2:3:4:5:6", "+1:00:00:00:00:00"]
        {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert!("01:00:00:00:00:00".parse::<Mac>().is_err(), "a group address");
        assert!("00:00:00:00:00:00".parse::<Mac>().is_err());
    }

    #[test]
    fn an_interface_name_is_what_the_kernel_takes() {
        assert!("nacre-0".parse::<InterfaceName>().is_ok());
        for wrong in ["", "0123456789abcdef", "a/b", "a b", "tap%d", "..", "a:1"] {
            assert!(wrong.parse::<InterfaceName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_tap_comes_by_name_or_by_descriptor_but_it_must_come() {
        assert_eq!(parse(&["--tap", "t0"]).unwrap().tap.unwrap().as_str(), "t0");
        assert_eq!(parse(&["--tap-fd", "3,4", "--queue-pairs", "2"]).unwrap().tap_fd, [3, 4]);
        assert!(parse(&[]).is_err());
        assert!(parse(&["--tap", "t0", "--tap-fd", "3"]).is_err());
        assert!(Args::try_parse_from(["nacre-net", "--print-capabilities"]).is_ok());
    }

    #[test]
    fn queue_pairs_and_mtu_have_limits() {
        assert!(parse(&["--tap", "t0", "--queue-pairs", "0"]).is_err());
        assert!(parse(&["--tap", "t0", "--queue-pairs", "33"]).is_err());
        assert!(parse(&["--tap", "t0", "--mtu", "67"]).is_err());
        assert_eq!(parse(&["--tap", "t0", "--mtu", "9000"]).unwrap().mtu, Some(9000));
    }
}
