//! What lies where in a virtio function's one BAR, and the capabilities that say so to the guest
//! (virtio 1.3, section 4.1.4).

use super::pci_registers::COMMON_LEN_BYTES;
use crate::pci::config_space::ConfigSpace;
use crate::pci::{BarIndex, BarSpec, BarWidth};

/// Bytes of the BAR.
pub(super) const BAR: BarSpec = BarSpec {
    index: BarIndex::ZERO,
    len_bytes: 0x1_0000,
    width: BarWidth::Bits64,
    prefetchable: false,
};
/// Bytes between the notification addresses of two queues.
pub(super) const NOTIFY_OFF_MULTIPLIER: u32 = 4;
/// Where the notification addresses begin.
pub(super) const NOTIFY: u32 = 0x3000;
/// Most queues of a function: vhost-user names a ring in eight bits.
pub(super) const MAX_QUEUES: u16 = 256;
/// Longest configuration (the vhost-user specification's VHOST_USER_MAX_CONFIG_SIZE).
pub(super) const MAX_CONFIG_LEN_BYTES: u16 = 256;

const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0xc000;

const VENDOR_CAPABILITY: u8 = 9;

/// A structure in the BAR, with an offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Common(u64),
    Isr(u64),
    Device(u64),
    /// A queue's notification address.
    Notify(u16),
    MsixTable(u64),
    MsixPending(u64),
}

impl Region {
    /// What is at `offset` of the BAR.
    pub(super) fn at(offset: u64) -> Self {
        let from = |start: u32| offset - u64::from(start);
        match offset {
            0..0x1000 => Self::Common(offset),
            0x1000..0x2000 => Self::Isr(from(ISR)),
            0x2000..0x3000 => Self::Device(from(DEVICE)),
            0x3000..0x4000 => {
                let queue = from(NOTIFY) / u64::from(NOTIFY_OFF_MULTIPLIER);
                Self::Notify(u16::try_from(queue).unwrap_or(u16::MAX))
            }
            0x4000..0xc000 => Self::MsixTable(from(MSIX_TABLE)),
            _ => Self::MsixPending(offset.saturating_sub(MSIX_PENDING.into())),
        }
    }
}

/// The structure types (virtio 1.3, section 4.1.4).
#[derive(Clone, Copy)]
enum CapabilityType {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    Pci = 5,
}

/// Adds BAR and capabilities; returns where the capability for access by configuration space is.
pub(super) fn describe(space: &mut ConfigSpace, queues: u16, config_len_bytes: u16) -> u16 {
    let notify_len = u32::from(queues) * NOTIFY_OFF_MULTIPLIER;
    let common_len = u32::try_from(COMMON_LEN_BYTES).unwrap_or(0);
    space.add_bar(BAR);
    space.add_msix(queues + 1, BAR.index, MSIX_TABLE, MSIX_PENDING);
    add(space, CapabilityType::Common, 0, common_len, &[]);
    let multiplier = NOTIFY_OFF_MULTIPLIER.to_le_bytes();
    add(space, CapabilityType::Notify, NOTIFY, notify_len, &multiplier);
    add(space, CapabilityType::Isr, ISR, 1, &[]);
    if config_len_bytes > 0 {
        add(space, CapabilityType::Device, DEVICE, config_len_bytes.into(), &[]);
    }
    add(space, CapabilityType::Pci, 0, 0, &[0; 4])
}

/// `struct virtio_pci_cap`, and what follows it.
fn add(
    space: &mut ConfigSpace,
    kind: CapabilityType,
    offset: u32,
    len_bytes: u32,
    more: &[u8],
) -> u16 {
    let total = 16 + more.len();
    let mut body = Vec::with_capacity(total);
    body.push(u8::try_from(total).unwrap_or(u8::MAX));
    body.push(kind as u8);
    // BAR, identity, padding.
    body.extend([BAR.index.number(), 0, 0, 0]);
    body.extend(offset.to_le_bytes());
    body.extend(len_bytes.to_le_bytes());
    body.extend(more);
    let mut writable = vec![0; body.len()];
    if matches!(kind, CapabilityType::Pci) {
        writable[2] = 0xff;
        writable[6..].fill(0xff);
    }
    space.add_capability(VENDOR_CAPABILITY, &body, &writable)
}

/// The window on the BAR that lies in configuration space (virtio 1.3, section 4.1.4.9).
pub(super) struct PciWindow {
    /// Where its four data bytes are in configuration space.
    pub(super) data: u16,
    /// The offset in the BAR and the length of an access, if the guest set the window up well.
    pub(super) target: Option<(u64, usize)>,
}

impl PciWindow {
    /// Reads what the guest wrote into the capability at `capability`.
    pub(super) fn read(space: &ConfigSpace, capability: u16) -> Self {
        let mut bytes = [0; 16];
        space.read(capability, &mut bytes);
        let [_, _, _, _, bar, _, _, _, a, b, c, d, e, f, g, h] = bytes;
        let offset = u64::from(u32::from_le_bytes([a, b, c, d]));
        let len = u32::from_le_bytes([e, f, g, h]);
        let target = (bar == BAR.index.number()
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len.into())
            && offset + u64::from(len) <= BAR.len_bytes)
            .then_some((offset, usize::try_from(len).unwrap_or(4)));
        Self { data: capability + 16, target }
    }

    /// Whether an access at `offset` of configuration space is one to the data bytes.
    pub(super) fn covers(&self, offset: u16) -> bool {
        (self.data..self.data + 4).contains(&offset)
    }
}
