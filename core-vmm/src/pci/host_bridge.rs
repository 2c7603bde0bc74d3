//! Function 0 of the bus: a host bridge with an identity and nothing behind it.
//!
//! Linux finds it first and asks it for nothing. It has no BARs and no capabilities; the windows
//! and the ECAM's place are told by ACPI.

use std::sync::Mutex;

use super::bar::{AddressRange, BarIndex, BarSpec};
use super::config_space::{CONVENTIONAL_LEN_BYTES, ConfigSpace, Effect, Identity};
use super::{ConfigEffect, PciFunction};
use crate::locked;

/// The id that Red Hat gave to generic PCI Express host bridges.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: [0x06, 0x00, 0x00],
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The host bridge.
pub(super) struct HostBridge {
    /// Locked because any vCPU may write a register.
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    pub(super) fn new() -> Self {
        Self { config: Mutex::new(ConfigSpace::new(&IDENTITY, CONVENTIONAL_LEN_BYTES)) }
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        locked(&self.config).read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        match locked(&self.config).write(offset, data) {
            // There is no BAR that could move.
            Effect::None | Effect::BarMoved | Effect::MsixChanged(_) => ConfigEffect::None,
        }
    }

    fn reset_config(&self) {
        locked(&self.config).reset();
    }

    fn bars(&self) -> Vec<BarSpec> {
        Vec::new()
    }

    fn place_bar(&self, _index: BarIndex, _address: u64) {}

    fn decoded(&self, _index: BarIndex) -> Option<AddressRange> {
        None
    }

    fn bar_mapped(&self, _index: BarIndex, _range: Option<AddressRange>) {}

    fn read_bar(&self, _index: BarIndex, _offset: u64, _data: &mut [u8]) {}

    fn write_bar(&self, _index: BarIndex, _offset: u64, _data: &[u8]) {}
}
