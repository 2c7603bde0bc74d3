//! Where a device is on the host's PCI buses.

use std::fmt;
use std::str::FromStr;

/// Segment, bus, device and function, as in `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress {
    segment: u16,
    bus: u8,
    /// Five bits of device, three of function.
    devfn: u8,
}

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI address like 0000:01:00.0")]
pub struct HostAddressError(String);

impl HostAddress {
    /// From the numbers as the kernel packs them.
    #[must_use]
    pub fn new(segment: u16, bus: u8, devfn: u8) -> Self {
        Self { segment, bus, devfn }
    }
}

impl FromStr for HostAddress {
    type Err = HostAddressError;

    /// The segment may be left out: it is 0 then.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| HostAddressError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<HostAddress> {
    // `from_str_radix` would take a sign.
    let digits = |part: &str, count: usize| {
        let all_hex = part.bytes().all(|byte| byte.is_ascii_hexdigit());
        (part.len() == count && all_hex).then(|| u16::from_str_radix(part, 16).ok()).flatten()
    };
    let (rest, function) = text.split_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (segment, bus) = rest.split_once(':').unwrap_or(("0000", rest));
    let bus = u8::try_from(digits(bus, 2)?).ok()?;
    let device = u8::try_from(digits(device, 2)?).ok().filter(|device| *device < 32)?;
    let function = u8::try_from(digits(function, 1)?).ok().filter(|function| *function < 8)?;
    Some(HostAddress { segment: digits(segment, 4)?, bus, devfn: device << 3 | function })
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bus, devfn } = self;
        write!(f, "{segment:04x}:{bus:02x}:{:02x}.{}", devfn >> 3, devfn & 7)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_address_is_read_with_and_without_its_segment() {
        for (text, full) in [("0000:01:00.0", "0000:01:00.0"), ("1f:1f.7", "0000:1f:1f.7")] {
            assert_eq!(text.parse::<HostAddress>().unwrap().to_string(), full);
        }
        for text in ["", "01:00", "01:20.0", "01:00.8", "0:1:0.0", "+000:01:00.0", "a:b:c:d.0"] {
            assert!(text.parse::<HostAddress>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_address_comes_back_and_any_text_is_read_or_refused(
            segment: u16, bus: u8, devfn: u8, text: String,
        ) {
            let address = HostAddress::new(segment, bus, devfn);
            prop_assert_eq!(address.to_string().parse(), Ok(address));
            text.parse::<HostAddress>().ok();
        }
    }
}
