//! PCI: one bus a segment, its configuration mechanisms and its two memory windows.
//!
//! [`PciRoot`] owns the buses, a [`PciBus`] its slots. A device is a [`PciFunction`]; virtio devices and passed-through ones
//! look the same from here. A vCPU comes in through one of four [`BusDevice`]s: [`Ecam`],
//! [`ConfigPorts`], and a [`MmioWindow`] for each window. All accesses reach a function cut into
//! naturally aligned pieces of 1, 2 or 4 bytes in configuration space.
//!
//! ```text
//! cf8/cfc, ECAM --> PciBus --> PciFunction::write_config --> ConfigEffect::BarsMoved
//!                     |                                             |
//!                     `-- the map of decoded BARs <-----------------'
//! low/high window --> PciBus (map) --> PciFunction::{read_bar, write_bar}
//! ```
//!
//! Nothing here knows virtio, KVM or ACPI.
//!
//! [`BusDevice`]: crate::bus::BusDevice

pub mod bar;
pub mod bus;
pub(crate) mod complaint;
pub mod config_access;
pub mod config_space;
mod host_bridge;
pub mod msix;
pub mod root;
pub mod slot;
#[cfg(test)]
pub(crate) mod tests;

pub use bar::{AddressRange, BarIndex, BarSpec, BarWidth};
pub use bus::{PciBus, PciError, PciWindows};
pub use config_access::{ConfigPorts, ECAM_LEN_BYTES, Ecam, MmioWindow};
pub use root::{PciAddress, PciRoot};
pub use slot::Slot;

/// What a write to a function's configuration space asks of the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigEffect {
    /// Nothing.
    None,
    /// A BAR moved, or decoding was switched on or off: ask [`PciFunction::decoded`] again.
    BarsMoved,
}

/// One function on the bus, called from any vCPU thread.
///
/// The bus never calls a function while the function calls the bus, and a function never calls the
/// bus: what it wants done it returns.
pub trait PciFunction: Send + Sync {
    /// Fills `data` from configuration space; `offset + data.len()` is at most 4096.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes one naturally aligned piece of at most four bytes to configuration space.
    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigEffect;

    /// The BARs that the function has.
    fn bars(&self) -> Vec<BarSpec>;

    /// Sets a BAR's first address, as firmware would; decoding stays off.
    fn place_bar(&self, index: BarIndex, address: u64);

    /// All registers as after power-on, with every vCPU stopped; BARs are placed again afterwards.
    fn reset_config(&self);

    /// Where the function decodes `index` now, if it does.
    fn decoded(&self, index: BarIndex) -> Option<AddressRange>;

    /// The bus maps (or no longer maps) a BAR there: what depends on the address follows.
    fn bar_mapped(&self, index: BarIndex, range: Option<AddressRange>);

    /// Fills `data` from `offset` in a BAR; the access lies within the BAR.
    fn read_bar(&self, index: BarIndex, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` of a BAR; the access lies within the BAR.
    fn write_bar(&self, index: BarIndex, offset: u64, data: &[u8]);
}
