//! The two lists of capabilities in a device's configuration space: where each is and how long.
//!
//! A list is the device's word: it may loop, lead out of the space, or overlap itself. What comes
//! out is in order, disjoint and inside.

/// Bytes of the conventional space.
pub const CONVENTIONAL_BYTES: usize = 256;
/// Bytes of the extended space.
pub const EXTENDED_BYTES: usize = 4096;

pub(crate) const STATUS: usize = 0x06;
pub(crate) const STATUS_CAPABILITIES: u8 = 1 << 4;
pub(crate) const POINTER: usize = 0x34;
const FIRST: usize = 0x40;

/// Ids of conventional capabilities (PCI Code and ID Assignment 1.15).
pub mod id {
    /// Power management.
    pub const POWER: u16 = 0x01;
    /// MSI.
    pub const MSI: u16 = 0x05;
    /// Whatever the vendor likes; virtio's are of this kind.
    pub const VENDOR: u16 = 0x09;
    /// The subsystem's ids, of a bridge.
    pub const SUBSYSTEM: u16 = 0x0d;
    /// PCI Express.
    pub const EXPRESS: u16 = 0x10;
    /// MSI-X.
    pub const MSIX: u16 = 0x11;
    /// Features that came from PCI Express to PCI: a function level reset.
    pub const ADVANCED: u16 = 0x13;
}

/// Ids of extended capabilities.
pub mod extended_id {
    /// The device's serial number.
    pub const SERIAL_NUMBER: u16 = 0x0003;
    /// Whatever the vendor likes.
    pub const VENDOR: u16 = 0x000b;
}

/// A capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What it is.
    pub id: u16,
    /// Where it begins.
    pub offset: usize,
    /// How long it is, its header included.
    pub len_bytes: usize,
}

fn byte(space: &[u8], at: usize) -> u8 {
    space.get(at).copied().unwrap_or(0)
}

pub(crate) fn word(space: &[u8], at: usize) -> u16 {
    u16::from(byte(space, at)) | u16::from(byte(space, at + 1)) << 8
}

pub(crate) fn long(space: &[u8], at: usize) -> u32 {
    u32::from(word(space, at)) | u32::from(word(space, at + 2)) << 16
}

/// The conventional capabilities of `space`, by address.
#[must_use]
pub fn conventional(space: &[u8]) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    if byte(space, STATUS) & STATUS_CAPABILITIES == 0 {
        return found;
    }
    let mut at = usize::from(byte(space, POINTER) & !3);
    while at >= FIRST && found.iter().all(|other| other.offset != at) {
        let id = u16::from(byte(space, at));
        let len_bytes = conventional_len(space, id, at);
        found.push(Capability { id, offset: at, len_bytes });
        at = usize::from(byte(space, at + 1) & !3);
    }
    disjoint(found, CONVENTIONAL_BYTES.min(space.len()))
}

/// How long a capability says that it is.
fn conventional_len(space: &[u8], id: u16, at: usize) -> usize {
    match id {
        id::POWER | id::SUBSYSTEM => 8,
        id::MSI => {
            let control = word(space, at + 2);
            let address = if control & MSI_64_BITS == 0 { 10 } else { 14 };
            address + if control & MSI_MASKS == 0 { 0 } else { 10 }
        }
        id::VENDOR => usize::from(byte(space, at + 2)),
        // The second version has room for slots and root ports too.
        id::EXPRESS if word(space, at + 2) & 0xf >= 2 => 0x3c,
        id::EXPRESS => 0x14,
        id::MSIX => 12,
        id::ADVANCED => 6,
        _ => 2,
    }
}

/// In an MSI capability's control register: there is an upper half of the address.
pub(crate) const MSI_64_BITS: u16 = 1 << 7;
/// There: each vector can be masked.
pub(crate) const MSI_MASKS: u16 = 1 << 8;

/// The extended capabilities of `space`, by address.
#[must_use]
pub fn extended(space: &[u8]) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    let mut at = CONVENTIONAL_BYTES;
    while at >= CONVENTIONAL_BYTES
        && at + 4 <= space.len().min(EXTENDED_BYTES)
        && found.iter().all(|other| other.offset != at)
    {
        let header = long(space, at);
        if header == 0 || header == u32::MAX {
            break;
        }
        let id = word(space, at);
        let len_bytes = match id {
            extended_id::SERIAL_NUMBER => 12,
            extended_id::VENDOR => usize::from(word(space, at + 6) >> 4),
            _ => 4,
        };
        found.push(Capability { id, offset: at, len_bytes });
        at = usize::from(word(space, at + 2) >> 4 & !3);
    }
    disjoint(found, EXTENDED_BYTES.min(space.len()))
}

/// Sorts, and cuts each where the next one or the space begins to end.
fn disjoint(mut found: Vec<Capability>, end: usize) -> Vec<Capability> {
    found.retain(|capability| capability.offset < end);
    found.sort_by_key(|capability| capability.offset);
    let limits: Vec<usize> =
        found.iter().skip(1).map(|next| next.offset).chain(Some(end)).collect();
    for (capability, limit) in found.iter_mut().zip(limits) {
        capability.len_bytes = capability.len_bytes.max(2).min(limit - capability.offset);
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn space(bytes: &[(usize, &[u8])]) -> Vec<u8> {
        let mut space = vec![0; EXTENDED_BYTES];
        space[STATUS] = STATUS_CAPABILITIES;
        for (at, data) in bytes {
            space[*at..at + data.len()].copy_from_slice(data);
        }
        space
    }

    #[test]
    fn a_list_is_followed_to_its_end() {
        let space = space(&[
            (POINTER, &[0x80]),
            (0x80, &[0x10, 0x60, 2, 0]),
            (0x60, &[0x01, 0x40, 3, 0]),
            (0x40, &[0x11, 0x00, 64, 0]),
        ]);
        let found: Vec<_> = conventional(&space)
            .into_iter()
            .map(|capability| (capability.id, capability.offset, capability.len_bytes))
            .collect();
        assert_eq!(found, [(0x11, 0x40, 12), (0x01, 0x60, 8), (0x10, 0x80, 0x3c)]);
    }

    #[test]
    fn a_list_that_loops_or_leaves_the_space_ends() {
        let looping = space(&[(POINTER, &[0x40]), (0x40, &[9, 0x50, 255]), (0x50, &[9, 0x40, 4])]);
        let found = conventional(&looping);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].len_bytes, 0x10, "it is cut where the next one begins");
        let outside = space(&[(POINTER, &[0x40]), (0x40, &[1, 0x20])]);
        assert_eq!(conventional(&outside).len(), 1);
        let endless = space(&[(0x100, &[0x0b, 0, 1, 0x10])]);
        assert_eq!(extended(&endless).len(), 1);
    }

    #[test]
    fn extended_capabilities_are_found() {
        let space = space(&[(0x100, &[0x10, 0, 1, 0x20]), (0x200, &[3, 0, 1, 0])]);
        let found: Vec<_> = extended(&space).iter().map(|other| (other.id, other.offset)).collect();
        assert_eq!(found, [(0x10, 0x100), (3, 0x200)]);
        assert!(extended(&space[..256]).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_the_device_says_capabilities_are_inside_and_disjoint(
            bytes in vec((0_usize..EXTENDED_BYTES, any::<u8>()), 0..400), len in 0..EXTENDED_BYTES,
        ) {
            let mut space = space(&[(POINTER, &[0x40])]);
            for (at, value) in bytes {
                space[at] = value;
            }
            space.truncate(len);
            for found in [conventional(&space), extended(&space)] {
                for pair in found.windows(2) {
                    prop_assert!(pair[0].offset + pair[0].len_bytes <= pair[1].offset);
                }
                prop_assert!(found.iter().all(|last| last.offset + last.len_bytes <= len));
            }
        }
    }
}
