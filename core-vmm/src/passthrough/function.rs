//! The half of a passed-through device that vCPUs see: a PCI function.
//!
//! Registers that are the device's own are read and written through its descriptor, without a lock;
//! what is ours (BARs, interrupts) is under one lock. A BAR's windows are shown to the guest where
//! the bus maps the BAR.

use std::sync::{Arc, Mutex, MutexGuard};

use vfio::config_space::{ConfigSpace, Effect};
use vfio::msix::MsixLayout;
use vfio::{Device, RegionIndex};

use super::interrupts::Interrupts;
use super::sys::Window;
use crate::error_chain;
use crate::locked;
use crate::pci::complaint::Complaints;
use crate::pci::{AddressRange, BarIndex, BarSpec, BarWidth, ConfigEffect, PciFunction};

/// Part of a BAR that is shown to the guest.
pub(super) struct Shown {
    pub(super) bar: u8,
    pub(super) offset: u64,
    pub(super) window: Window,
}

/// What a function is made of.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) device: Arc<Device>,
    pub(super) config: ConfigSpace,
    pub(super) interrupts: Interrupts,
    pub(super) shown: Vec<Shown>,
}

pub(super) struct AssignedFunction {
    device: Arc<Device>,
    msix: Option<MsixLayout>,
    bars: Vec<BarSpec>,
    /// Locked by vCPUs for register work, and by the control thread for resets.
    state: Mutex<State>,
}

struct State {
    config: ConfigSpace,
    interrupts: Interrupts,
    shown: Vec<Shown>,
    complaints: Complaints,
}

/// What is where in a BAR.
enum Place {
    /// The MSI-X table, from this offset.
    Table(u64),
    /// Its pending bits.
    Pending(u64),
    /// The device's own.
    Device,
}

impl AssignedFunction {
    pub(super) fn new(parts: Parts) -> Self {
        let spec = |bar: &vfio::Bar| {
            Some(BarSpec {
                index: BarIndex::new(bar.index)?,
                len_bytes: bar.len_bytes,
                width: if bar.is_64_bits { BarWidth::Bits64 } else { BarWidth::Bits32 },
                prefetchable: bar.is_prefetchable,
            })
        };
        let bars = parts.config.bars().iter().filter_map(spec).collect();
        let state = State {
            config: parts.config,
            interrupts: parts.interrupts,
            shown: parts.shown,
            complaints: Complaints::about(&parts.name),
        };
        let msix = state.config.msix();
        Self { device: parts.device, msix, bars, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Sends no interrupts any more, whatever the guest wants.
    pub(super) fn silence(&self) {
        self.state().interrupts.silence();
    }

    /// The device's line raises this pin of the I/O APIC.
    pub(super) fn connect_line(&self, pin: u32) {
        self.state().interrupts.connect_line(pin);
    }

    /// The device was reset and is to be used again.
    pub(super) fn resume(&self) {
        self.state().interrupts.resume();
    }

    /// Back to power-on but for the configuration, with every vCPU stopped.
    pub(super) fn power_on(&self) {
        self.state().interrupts.reset();
    }

    fn place(&self, bar: BarIndex, offset: u64) -> Place {
        let Some(msix) = self.msix else { return Place::Device };
        if msix.table_bar == bar.number() && msix.table.contains(offset) {
            Place::Table(offset - msix.table.offset)
        } else if msix.pending_bar == bar.number() && msix.pending.contains(offset) {
            Place::Pending(offset - msix.pending.offset)
        } else {
            Place::Device
        }
    }

    fn complain(&self, error: &vfio::DeviceError) {
        self.state().complaints.log(format_args!("{}", error_chain(error)));
    }

    /// Fills `data` from the device; with ones where it does not answer, as a bus would.
    fn read_device(&self, region: RegionIndex, offset: u64, data: &mut [u8]) {
        if let Err(error) = self.device.read(region, offset, data) {
            data.fill(0xff);
            self.complain(&error);
        }
    }

    fn write_device(&self, region: RegionIndex, offset: u64, data: &[u8]) {
        if let Err(error) = self.device.write(region, offset, data) {
            self.complain(&error);
        }
    }
}

impl PciFunction for AssignedFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut failed = None;
        self.state().config.read(offset, data, |data| {
            if let Err(error) = self.device.read(RegionIndex::CONFIG, offset.into(), data) {
                data.fill(0xff);
                failed = Some(error);
            }
        });
        if let Some(error) = failed {
            self.complain(&error);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        let mut state = self.state();
        let (to_device, effect) = state.config.write(offset, data);
        match effect {
            Effect::None | Effect::BarsMoved => {}
            Effect::MsixChanged(control) => {
                state.interrupts.change_msix(|msix| msix.set_control(control));
            }
            Effect::MsiChanged(msi) => state.interrupts.change_msi(msi),
        }
        drop(state);
        if let Some(to_device) = to_device {
            self.write_device(RegionIndex::CONFIG, offset.into(), to_device.bytes());
        }
        if effect == Effect::BarsMoved { ConfigEffect::BarsMoved } else { ConfigEffect::None }
    }

    fn bars(&self) -> Vec<BarSpec> {
        self.bars.clone()
    }

    fn place_bar(&self, index: BarIndex, address: u64) {
        self.state().config.place_bar(index.number(), address);
    }

    fn reset_config(&self) {
        self.state().config.reset();
    }

    fn decoded(&self, index: BarIndex) -> Option<AddressRange> {
        let spec = self.bars.iter().find(|spec| spec.index == index)?;
        let start = self.state().config.decoded(index.number())?;
        Some(AddressRange { start, len_bytes: spec.len_bytes })
    }

    fn bar_mapped(&self, index: BarIndex, range: Option<AddressRange>) {
        let mut state = self.state();
        let State { shown, complaints, .. } = &mut *state;
        for part in shown.iter_mut().filter(|part| part.bar == index.number()) {
            let result = match range {
                Some(range) => part.window.show_at(range.start + part.offset),
                None => part.window.hide(),
            };
            if let Err(error) = result {
                // What is not shown is trapped: slower, not lost.
                complaints.log(format_args!("KVM does not take a part of a BAR: {error}"));
            }
        }
    }

    fn read_bar(&self, index: BarIndex, offset: u64, data: &mut [u8]) {
        match self.place(index, offset) {
            Place::Table(at) => match self.state().interrupts.table() {
                Some(vectors) => vectors.msix().read_table(at, data),
                None => data.fill(0),
            },
            Place::Pending(at) => match self.state().interrupts.table() {
                Some(vectors) => {
                    vectors.msix().read_pending(at, data, |vector| vectors.is_pending(vector));
                }
                None => data.fill(0),
            },
            Place::Device => self.read_device(RegionIndex::bar(index.number()), offset, data),
        }
    }

    fn write_bar(&self, index: BarIndex, offset: u64, data: &[u8]) {
        match self.place(index, offset) {
            Place::Table(at) => {
                self.state().interrupts.change_msix(|msix| msix.write_table(at, data));
            }
            Place::Pending(_) => {}
            // An access that reaches into the table from before it is none that a driver makes.
            Place::Device if self.reaches_table(index, offset, data.len()) => {}
            Place::Device => self.write_device(RegionIndex::bar(index.number()), offset, data),
        }
    }
}

impl AssignedFunction {
    fn reaches_table(&self, bar: BarIndex, offset: u64, len: usize) -> bool {
        let last = offset.saturating_add(len as u64).saturating_sub(1);
        matches!(self.place(bar, last), Place::Table(_) | Place::Pending(_))
    }
}
