//! Where a PCI function is, in the way that Linux writes it: `0000:00:05.0`.

use std::{fmt, str::FromStr};

/// The address of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    segment: u16,
    bus: u8,
    /// 0 to 31.
    device: u8,
    /// 0 to 7.
    function: u8,
}

/// A text that names no PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no PCI address: one such as 0000:00:05.0 is expected", .0.escape_debug())]
pub struct NoPciAddress(String);

/// How much of a text that is no address is repeated, in characters.
const REPEATED_CHARS: usize = 32;

impl FromStr for PciAddress {
    type Err = NoPciAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| NoPciAddress(text.chars().take(REPEATED_CHARS).collect()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (bus, function) = text.rsplit_once('.')?;
    let (bus, device) = bus.rsplit_once(':')?;
    let (segment, bus) = bus.split_once(':')?;
    let digits = |text: &str, length| {
        (text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .then(|| u16::from_str_radix(text, 16).ok())
            .flatten()
    };
    let byte = |number: u16, limit: u16| {
        if number < limit { u8::try_from(number).ok() } else { None }
    };
    Some(PciAddress {
        segment: digits(segment, 4)?,
        bus: byte(digits(bus, 2)?, 256)?,
        device: byte(digits(device, 2)?, 32)?,
        function: byte(digits(function, 1)?, 8)?,
    })
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bus, device, function } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

    #[test]
    fn an_address_is_read_and_written_as_linux_does() {
        for text in ["0000:00:05.0", "ffff:ff:1f.7", "0001:0a:00.3"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "00:05.0",
            "0000:00:05",
            "0000:00:20.0",
            "0000:00:05.8",
            "0000:00:5.0",
            "00000:00:05.0",
            "0000:00:05.0 ",
            "0000:00:05.0/../..",
            "+000:00:05.0",
            "0000:00:00:05.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_without_panic(text: String) {
            text.parse::<PciAddress>().ok();
        }
    }
}
