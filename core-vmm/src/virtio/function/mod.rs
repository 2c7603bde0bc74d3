//! The half of a virtio device that vCPUs see: a PCI function.
//!
//! All of its state is under one lock, held for register work and for the ioctls that follow a
//! BAR or a vector. What needs the backend is left for the control thread, which is woken.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use super::bar_layout::{self, NOTIFY, NOTIFY_OFF_MULTIPLIER, PciWindow, Region};
use super::device_kind::DeviceKind;
use super::doorbell::Doorbells;
use super::pci_registers::{Activation, ConfigWrite, Effect, PciRegisters};
use crate::interrupt::Vectors;
use crate::locked;
use crate::pci::complaint::Complaints;
use crate::pci::config_space::{self, CONVENTIONAL_LEN_BYTES, ConfigSpace, Identity};
use crate::pci::{AddressRange, BarIndex, BarSpec, ConfigEffect, PciFunction};
use crate::shared_event;

const VIRTIO_VENDOR: u16 = 0x1af4;

/// How many configuration writes wait for the control thread at most.
const MAX_CONFIG_WRITES: usize = 64;

/// What the vCPUs left for the control thread.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) config_writes: Vec<ConfigWrite>,
    pub(super) request: Request,
}

/// What the driver waits for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Nothing,
    Start(Activation),
    Reset,
}

/// What a function is made of.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) kind: DeviceKind,
    pub(super) registers: PciRegisters,
    pub(super) config_len_bytes: u16,
    pub(super) vectors: Vectors,
    /// One for each queue.
    pub(super) kicks: Vec<EventFd>,
    /// The source that comes after the queues' in `vectors`.
    pub(super) config_event: EventFd,
    /// Tells the control thread that there is work.
    pub(super) wake: EventFd,
    pub(super) doorbells: Arc<dyn Doorbells>,
}

pub(super) struct VirtioFunction {
    name: String,
    kicks: Vec<EventFd>,
    config_event: EventFd,
    wake: EventFd,
    doorbells: Arc<dyn Doorbells>,
    /// Where the capability for access by configuration space is.
    pci_window: u16,
    /// Locked by vCPUs for register work and by the control thread for its answers.
    state: Mutex<State>,
}

struct State {
    config: ConfigSpace,
    registers: PciRegisters,
    vectors: Vectors,
    /// Where the doorbells are.
    notify_base: Option<u64>,
    config_writes: VecDeque<ConfigWrite>,
    /// The driver became ready since the last reset, so that the control thread has to finish the
    /// next one.
    handed_over: bool,
    complaints: Complaints,
}

impl VirtioFunction {
    pub(super) fn new(parts: Parts) -> Self {
        let identity = Identity {
            vendor: VIRTIO_VENDOR,
            device: parts.kind.pci_device_id(),
            // Of a device without a legacy interface (virtio 1.3, section 4.1.2.1).
            revision: 1,
            class: parts.kind.pci_class(),
            subsystem_vendor: VIRTIO_VENDOR,
            subsystem: 0x1100,
        };
        let mut config = ConfigSpace::new(&identity, CONVENTIONAL_LEN_BYTES);
        let queues = u16::try_from(parts.kicks.len()).unwrap_or(bar_layout::MAX_QUEUES);
        let pci_window = bar_layout::describe(&mut config, queues, parts.config_len_bytes);
        let state = State {
            config,
            registers: parts.registers,
            vectors: parts.vectors,
            notify_base: None,
            config_writes: VecDeque::new(),
            handed_over: false,
            complaints: Complaints::about(&parts.name),
        };
        Self {
            name: parts.name,
            kicks: parts.kicks,
            config_event: parts.config_event,
            wake: parts.wake,
            doorbells: parts.doorbells,
            pci_window,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// What the vCPUs left. The request stays until it is answered.
    pub(super) fn take_work(&self) -> Work {
        let mut state = self.state();
        let request = if state.registers.is_resetting() {
            Request::Reset
        } else if state.registers.is_driver_ok() {
            Request::Start(state.registers.activation())
        } else {
            Request::Nothing
        };
        Work { config_writes: state.config_writes.drain(..).collect(), request }
    }

    /// The backend has stopped: the driver sees that the reset is done.
    pub(super) fn finish_reset(&self) {
        self.state().finish_reset();
    }

    /// Back to power-on, with all vCPUs stopped.
    pub(super) fn power_on(&self) {
        let mut state = self.state();
        state.finish_reset();
        state.vectors.reset();
    }

    /// The driver has to reset the device before it works again.
    pub(super) fn needs_reset(&self) {
        if self.state().registers.set_needs_reset() {
            self.interrupt_config();
        }
    }

    /// A backend came that has less on offer than the one before.
    pub(super) fn restrict_offer(&self, offered: u64) {
        self.state().registers.restrict_offer(offered);
    }

    /// What the backend says the configuration is.
    pub(super) fn set_config(&self, config: &[u8]) {
        if self.state().registers.set_config(config) {
            self.interrupt_config();
        }
    }

    fn interrupt_config(&self) {
        self.state().registers.raise_config_isr();
        signal(&self.config_event, &self.name);
    }

    fn apply(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Vector(source, vector) => {
                state.vectors.assign(source, vector);
            }
            Effect::DriverOk => {
                state.handed_over = true;
                signal(&self.wake, &self.name);
            }
            // No backend has to stop, so the driver need not wait.
            Effect::Reset if !state.handed_over => state.finish_reset(),
            Effect::Reset => signal(&self.wake, &self.name),
            Effect::ConfigWritten(write) if state.config_writes.len() < MAX_CONFIG_WRITES => {
                state.config_writes.push_back(write);
                signal(&self.wake, &self.name);
            }
            Effect::ConfigWritten(_) => state.refuse("floods its configuration"),
            Effect::Refused(what) => state.refuse(what),
        }
    }

    fn notify_addresses(&self, base: u64) -> impl Iterator<Item = (u64, &EventFd)> {
        (base..).step_by(NOTIFY_OFF_MULTIPLIER as usize).zip(&self.kicks)
    }

    fn move_doorbells(&self, state: &mut State, base: Option<u64>) {
        let complaints = &mut state.complaints;
        let mut outcome = |what: &str, address: u64, result: io::Result<()>| {
            if let Err(error) = result {
                // A kick then stops in the VMM, which passes it on: slower, not lost.
                complaints.log(format_args!("cannot {what} doorbell {address:#x}: {error}"));
            }
        };
        for (address, kick) in state.notify_base.into_iter().flat_map(|b| self.notify_addresses(b))
        {
            outcome("remove", address, self.doorbells.silence(address, kick));
        }
        for (address, kick) in base.into_iter().flat_map(|base| self.notify_addresses(base)) {
            outcome("set", address, self.doorbells.ring_at(address, kick));
        }
        state.notify_base = base;
    }
}

impl State {
    fn finish_reset(&mut self) {
        self.registers.finish_reset();
        self.vectors.unassign_all();
        self.config_writes.clear();
        self.handed_over = false;
    }

    fn refuse(&mut self, what: &str) {
        self.complaints.log(format_args!("the driver {what}"));
    }
}

fn signal(event: &EventFd, name: &str) {
    if let Err(error) = shared_event::raise(event) {
        log::warn!("{name}: cannot signal an eventfd: {error}");
    }
}

impl PciFunction for VirtioFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let window = {
            let state = self.state();
            state.config.read(offset, data);
            PciWindow::read(&state.config, self.pci_window)
        };
        if let Some((target, len)) = window.target
            && window.covers(offset)
        {
            let mut bytes = [0; 4];
            self.read_bar(BarIndex::ZERO, target, &mut bytes[..len]);
            let skip = usize::from(offset - window.data);
            for (byte, value) in data.iter_mut().zip(&bytes[skip..]) {
                *byte = *value;
            }
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        let mut bytes = [0; 4];
        let window = {
            let mut state = self.state();
            match state.config.write(offset, data) {
                config_space::Effect::None => {}
                config_space::Effect::BarMoved => return ConfigEffect::BarsMoved,
                config_space::Effect::MsixChanged(control) => {
                    state.vectors.change(|msix| msix.set_control(control));
                }
            }
            let window = PciWindow::read(&state.config, self.pci_window);
            state.config.read(window.data, &mut bytes);
            window
        };
        if let Some((target, len)) = window.target
            && window.covers(offset)
        {
            self.write_bar(BarIndex::ZERO, target, &bytes[..len]);
        }
        ConfigEffect::None
    }

    fn bars(&self) -> Vec<BarSpec> {
        vec![bar_layout::BAR]
    }

    fn place_bar(&self, index: BarIndex, address: u64) {
        self.state().config.place_bar(index, address);
    }

    fn decoded(&self, index: BarIndex) -> Option<AddressRange> {
        self.state().config.decoded(index)
    }

    fn bar_mapped(&self, _index: BarIndex, range: Option<AddressRange>) {
        let base = range.map(|range| range.start + u64::from(NOTIFY));
        self.move_doorbells(&mut self.state(), base);
    }

    fn read_bar(&self, _index: BarIndex, offset: u64, data: &mut [u8]) {
        let mut state = self.state();
        match Region::at(offset) {
            Region::Common(at) => state.registers.read_common(at, data),
            Region::Isr(at) => state.registers.read_isr(at, data),
            Region::Device(at) => state.registers.read_config(at, data),
            Region::Notify(_) => data.fill(0),
            Region::MsixTable(at) => state.vectors.msix().read_table(at, data),
            Region::MsixPending(at) => {
                let vectors = &state.vectors;
                vectors.msix().read_pending(at, data, |vector| vectors.is_pending(vector));
            }
        }
    }

    fn write_bar(&self, _index: BarIndex, offset: u64, data: &[u8]) {
        if let Region::Notify(queue) = Region::at(offset) {
            // Only where the kernel did not take the doorbell.
            if let Some(kick) = self.kicks.get(usize::from(queue)) {
                signal(kick, &self.name);
            }
            return;
        }
        let mut state = self.state();
        let effect = match Region::at(offset) {
            Region::Common(at) => state.registers.write_common(at, data),
            Region::Device(at) => state.registers.write_config(at, data),
            Region::MsixTable(at) => {
                state.vectors.change(|msix| msix.write_table(at, data));
                Effect::None
            }
            Region::Isr(_) | Region::Notify(_) | Region::MsixPending(_) => Effect::None,
        };
        self.apply(&mut state, effect);
    }

    fn reset_config(&self) {
        self.state().config.reset();
    }
}

impl Drop for VirtioFunction {
    fn drop(&mut self) {
        self.move_doorbells(&mut self.state(), None);
    }
}

#[cfg(test)]
mod tests;
