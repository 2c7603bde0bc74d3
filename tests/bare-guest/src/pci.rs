//! One PCI bus: finds virtio functions, gives them addresses where nobody did, and sets up MSI-X.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{
    BarInfo, Cam, Command, ConfigurationAccess, DeviceFunction, MmioCam, PciRoot,
};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};

use crate::dma::Identity;
use crate::machine::{inl, outl, read32, write16, write32, write64};

/// The 32-bit window's part that this guest gives addresses from.
static NEXT_ADDRESS: AtomicU64 = AtomicU64::new(0xd000_0000);

/// Configuration space through ports 0xcf8 and 0xcfc.
pub struct Ports;

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        outl(0xcf8, select(function, offset));
        inl(0xcfc)
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        outl(0xcf8, select(function, offset));
        outl(0xcfc, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

fn select(function: DeviceFunction, offset: u8) -> u32 {
    1 << 31
        | u32::from(function.bus) << 16
        | u32::from(function.device) << 11
        | u32::from(function.function) << 8
        | u32::from(offset & 0xfc)
}

/// The bus through ECAM at `base`.
pub fn ecam_root(base: u64) -> PciRoot<MmioCam<'static>> {
    PciRoot::new(unsafe { MmioCam::new(base as *mut u8, Cam::Ecam) })
}

/// The `nth` function of a virtio device type, or none.
pub fn find(kind: DeviceType, nth: usize) -> Option<DeviceFunction> {
    PciRoot::new(Ports)
        .enumerate_bus(0)
        .filter(|(_, info)| virtio_device_type(info) == Some(kind))
        .nth(nth)
        .map(|(function, _)| function)
}

/// The first function with this device id, of virtio's vendor id.
pub fn find_id(device_id: u16) -> Option<DeviceFunction> {
    PciRoot::new(Ports)
        .enumerate_bus(0)
        .find(|(_, info)| (info.vendor_id, info.device_id) == (0x1af4, device_id))
        .map(|(function, _)| function)
}

/// Gives the function's memory BARs addresses and lets it decode them.
pub fn enable(function: DeviceFunction) {
    let mut root = PciRoot::new(Ports);
    let bars = root.bars(function).expect("BARs can be sized");
    for (index, bar) in (0_u8..).zip(bars) {
        let Some(BarInfo::Memory { address, size, address_type, .. }) = bar else { continue };
        if address != 0 || size == 0 {
            continue;
        }
        let base = NEXT_ADDRESS.load(Ordering::Relaxed).next_multiple_of(size);
        NEXT_ADDRESS.store(base + size, Ordering::Relaxed);
        match address_type {
            virtio_drivers::transport::pci::bus::MemoryBarType::Width64 => {
                root.set_bar_64(function, index, base);
            }
            _ => root.set_bar_32(function, index, u32::try_from(base).expect("32-bit window")),
        }
    }
    root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
}

/// The transport of an enabled function.
pub fn transport(function: DeviceFunction) -> PciTransport {
    PciTransport::new::<Identity, _>(&mut PciRoot::new(Ports), function).expect("a virtio function")
}

/// The transport of an enabled function whose device type the `virtio-drivers` crate does not know.
pub fn transport_in_disguise(function: DeviceFunction) -> PciTransport {
    let mut root = PciRoot::new(Disguise);
    PciTransport::new::<Identity, _>(&mut root, function).expect("a virtio function")
}

/// The ports, but every function is an entropy source.
struct Disguise;

impl ConfigurationAccess for Disguise {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        match offset {
            0 => 0x1044_1af4,
            _ => Ports.read_word(function, offset),
        }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        Ports.write_word(function, offset, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// The address that a capability's BAR and offset name.
fn bar_address(function: DeviceFunction, bar: u8, offset: u32) -> u64 {
    let info = PciRoot::new(Ports).bar_info(function, bar).expect("a BAR").expect("a BAR in use");
    info.memory_address_size().expect("a memory BAR").0 + u64::from(offset)
}

/// The common configuration structure (virtio 1.3, section 4.1.4.3).
pub fn common_config(function: DeviceFunction) -> u64 {
    let capability = PciRoot::new(Ports)
        .capabilities(function)
        .find(|capability| capability.id == 9 && capability.private_header >> 8 == 1)
        .expect("a common configuration capability");
    let word = |offset| Ports.read_word(function, capability.offset + offset);
    bar_address(function, word(4) as u8, word(8))
}

/// Sends MSI-X vector `entry` of the function to interrupt `vector` of processor 0.
pub fn route_msix(function: DeviceFunction, entry: u16, vector: u8) {
    let offset = msix_capability(function);
    let table = Ports.read_word(function, offset + 4);
    let at = bar_address(function, (table & 7) as u8, table & !7) + u64::from(entry) * 16;
    write64(at, 0xfee0_0000);
    write32(at + 8, u32::from(vector));
    write32(at + 12, 0);
    let control = Ports.read_word(function, offset);
    Ports.write_word(function, offset, (control | 1 << 31) & !(1 << 30));
}

/// Masks or unmasks one entry of the function's MSI-X table.
pub fn mask_msix(function: DeviceFunction, entry: u16, masked: bool) {
    let table = Ports.read_word(function, msix_capability(function) + 4);
    let at = bar_address(function, (table & 7) as u8, table & !7) + u64::from(entry) * 16;
    write32(at + 12, u32::from(masked));
    assert_eq!(read32(at + 12), u32::from(masked), "the mask bit can be read back");
}

fn msix_capability(function: DeviceFunction) -> u8 {
    PciRoot::new(Ports)
        .capabilities(function)
        .find(|capability| capability.id == 0x11)
        .expect("an MSI-X capability")
        .offset
}

/// Sends queue `queue`'s interrupts to MSI-X entry `entry`.
pub fn set_queue_vector(function: DeviceFunction, queue: u16, entry: u16) {
    let common = common_config(function);
    write16(common + 22, queue);
    write16(common + 26, entry);
}

/// A pointer to memory-mapped registers.
pub fn registers(address: u64) -> NonNull<u8> {
    NonNull::new(address as *mut u8).expect("registers are not at 0")
}
