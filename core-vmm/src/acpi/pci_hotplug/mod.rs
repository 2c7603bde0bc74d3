//! PCI hotplug: functions are put on the buses, and the guest is asked to look at them or to give
//! them up. The registers are [`registers`], what Linux runs to use them is [`aml`].
//!
//! ```text
//! control thread                          vCPU threads
//!   plug ----> root.attach, UP bit   --->  PSCN reads UP,   Notify(slot, 1)
//!   ask_for -> DOWN bit              --->  PSCN reads DOWN, Notify(slot, 3)
//!   take_news <-- news, notifier <-------  _EJ0 writes EJECT: root.withdraw
//!   finish --> root.release          <---  _OST writes STATUS
//! ```
//!
//! A function is visible in configuration space from the moment that its UP bit is set, under one
//! lock, and not any more when the guest's eject returns; what is left of it is cleared away by the
//! control thread.

pub(super) mod aml;
mod registers;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use self::registers::{Effect, Registers};
use crate::{
    bus::BusDevice,
    event::{GuestEvent, Notifier},
    locked,
    pci::{PciAddress, PciFunction, PciRoot, bus::PciError, complaint::Complaints},
};

/// What the guest made of a request to give up a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It gave the function up, which it sees no more.
    Ejected(PciAddress),
    /// It will not.
    Kept {
        /// Where the function is.
        address: PciAddress,
        /// Its reason, an `_OST` status code.
        status: u32,
    },
}

/// The registers and the buses behind them.
pub struct PciHotplug {
    root: PciRoot,
    notifier: Arc<Notifier>,
    /// Locked by vCPUs for register work and by the control thread for its requests.
    state: Mutex<State>,
}

struct State {
    registers: Registers,
    /// At most two a request of the control thread's.
    news: Vec<News>,
    complaints: Complaints,
}

impl PciHotplug {
    /// For `root`, on which nothing is yet; `notifier` wakes the control thread when there is news.
    #[must_use]
    pub fn new(root: PciRoot, notifier: Arc<Notifier>) -> Self {
        let registers = Registers::new(root.segments().len());
        let complaints = Complaints::about("PCI hotplug");
        let state = Mutex::new(State { registers, news: Vec::new(), complaints });
        Self { root, notifier, state }
    }

    /// The buses.
    #[must_use]
    pub fn root(&self) -> &PciRoot {
        &self.root
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Puts `function` on a bus before the guest runs.
    ///
    /// # Errors
    ///
    /// Fails if there is no room; nothing is changed then.
    pub fn place(&self, function: &Arc<dyn PciFunction>) -> Result<PciAddress, PciError> {
        let address = self.root.attach(function)?;
        self.state().registers.is_there(address);
        Ok(address)
    }

    /// Puts `function` on a bus, to be told to the guest by the next event.
    ///
    /// # Errors
    ///
    /// Fails if there is no room; nothing is changed then.
    pub fn plug(&self, function: &Arc<dyn PciFunction>) -> Result<PciAddress, PciError> {
        let mut state = self.state();
        let address = self.root.attach(function)?;
        state.registers.added(address);
        Ok(address)
    }

    /// The next event will ask the guest for what is at `address`. False if it was asked already.
    #[must_use]
    pub fn ask_for(&self, address: PciAddress) -> bool {
        self.state().registers.ask_for(address)
    }

    /// Whether the guest was asked for what is at `address`.
    #[must_use]
    pub fn is_leaving(&self, address: PciAddress) -> bool {
        self.state().registers.is_leaving(address)
    }

    /// Whether the guest has given up what is at `address`.
    #[must_use]
    pub fn is_ejected(&self, address: PciAddress) -> bool {
        self.state().registers.is_ejected(address)
    }

    /// Takes away what is at `address`, whether or not the guest gave it up: the place is free.
    pub fn finish(&self, address: PciAddress) {
        let mut state = self.state();
        drop(self.root.withdraw(address));
        self.root.release(address);
        state.registers.removed(address);
    }

    /// What happened since the last time this was asked, oldest first.
    #[must_use]
    pub fn take_news(&self) -> Vec<News> {
        std::mem::take(&mut self.state().news)
    }

    /// Buses and registers as after power-on, with every vCPU stopped.
    pub fn reset(&self) {
        self.state().registers.reset();
        self.root.reset();
    }

    fn tell(&self, state: &mut State, news: News) {
        state.news.push(news);
        self.notifier.notify(GuestEvent::PciHotplug);
    }
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if data.len() == size_of::<u32>() {
            data.copy_from_slice(&self.state().registers.read(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let mut state = self.state();
        match state.registers.write(offset, u32::from_le_bytes(bytes)) {
            Effect::None => {}
            Effect::Ejected(address) => {
                // Before the eject returns: what the guest reads there then is nothing.
                drop(self.root.withdraw(address));
                self.tell(&mut state, News::Ejected(address));
            }
            Effect::Kept(address, status) => {
                self.tell(&mut state, News::Kept { address, status });
            }
            Effect::Unusable(address, status) => {
                let what = format_args!("the guest can't use {address}: status {status:#x}");
                state.complaints.log(what);
            }
            Effect::Refused(what) => state.complaints.log(format_args!("the guest {what}")),
        }
    }
}

impl fmt::Debug for PciHotplug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciHotplug").field("root", &self.root).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::registers::{DOWN, EJECT, STATUS, STATUS_EVENT, STATUS_SLOT, UP};
    use super::*;
    use crate::event::{self, Mailbox};
    use crate::memory::layout;
    use crate::pci::tests::Probe;
    use crate::pci::{AddressRange, Ecam, PciWindows};
    use crate::vcpu::gate::Gate;

    struct Machine {
        hotplug: PciHotplug,
        ecam: Ecam,
        mailbox: Mailbox,
    }

    fn machine() -> Machine {
        let range = |range: std::ops::Range<u64>| AddressRange {
            start: range.start,
            len_bytes: range.end - range.start,
        };
        let windows = PciWindows {
            low: range(layout::PCI_WINDOW_32),
            high: range(layout::pci_window_64(40)),
        };
        let root = PciRoot::new([windows]);
        let (notifier, mailbox) = event::channel(Arc::new(Gate::new())).unwrap();
        let ecam = Ecam::new(Arc::clone(&root.segments()[0]));
        Machine { hotplug: PciHotplug::new(root, notifier), ecam, mailbox }
    }

    impl Machine {
        fn plug(&self) -> PciAddress {
            let function: Arc<dyn PciFunction> = Probe::small();
            self.hotplug.plug(&function).unwrap()
        }

        fn read(&self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            self.hotplug.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u32) {
            self.hotplug.write(offset, &value.to_le_bytes());
        }

        fn is_visible(&self, address: PciAddress) -> bool {
            let mut data = [0; 4];
            self.ecam.read(u64::from(address.slot.number()) << 15, &mut data);
            data != [0xff; 4]
        }
    }

    #[test]
    fn a_function_is_visible_until_its_eject_and_its_slot_is_used_again() {
        let machine = machine();
        let address = machine.plug();
        assert_eq!(address.to_string(), "0000:00:01.0");
        assert!(machine.is_visible(address));
        assert_eq!(machine.read(UP), 2);
        assert!(machine.hotplug.ask_for(address));
        assert_eq!(machine.read(DOWN), 2);
        assert!(machine.is_visible(address), "the guest still has it");
        machine.write(EJECT, 1);
        assert!(!machine.is_visible(address));
        assert!(matches!(machine.mailbox.take(), Some(GuestEvent::PciHotplug)));
        assert_eq!(machine.hotplug.take_news(), [News::Ejected(address)]);
        assert_eq!(machine.plug().slot.number(), 2, "the first slot is not cleared away yet");
        machine.hotplug.finish(address);
        assert!(!machine.hotplug.is_leaving(address));
        assert_eq!(machine.plug(), address);
    }

    #[test]
    fn a_guest_that_refuses_is_heard_and_one_that_was_not_asked_is_not() {
        let machine = machine();
        let address = machine.plug();
        let refuse = || {
            machine.write(STATUS_SLOT, 1);
            machine.write(STATUS_EVENT, 3);
            machine.write(STATUS, 0x82);
        };
        machine.write(EJECT, 1);
        refuse();
        assert!(machine.is_visible(address));
        assert_eq!(machine.hotplug.take_news(), []);
        assert!(machine.hotplug.ask_for(address));
        refuse();
        assert!(!machine.hotplug.is_leaving(address) && machine.is_visible(address));
        assert_eq!(machine.hotplug.take_news(), [News::Kept { address, status: 0x82 }]);
    }

    #[test]
    fn accesses_of_other_widths_read_as_zero_and_write_nothing() {
        let machine = machine();
        let address = machine.plug();
        for width in [1, 2, 3, 8] {
            let mut data = vec![0xff; width];
            machine.hotplug.read(UP, &mut data);
            assert_eq!(data, vec![0; width]);
        }
        assert_eq!(machine.read(UP), 2, "they cleared nothing");
        assert!(machine.hotplug.ask_for(address));
        machine.hotplug.write(EJECT, &[1]);
        machine.hotplug.write(EJECT, &[1, 0]);
        assert!(machine.is_visible(address));
    }

    #[test]
    fn what_the_guest_never_gave_up_can_be_taken_away_from_one_that_was_reset() {
        let machine = machine();
        let address = machine.plug();
        assert!(machine.hotplug.ask_for(address));
        machine.hotplug.reset();
        assert!(machine.hotplug.is_leaving(address));
        machine.hotplug.finish(address);
        assert!(!machine.is_visible(address));
        assert_eq!(machine.read(DOWN), 0);
        assert_eq!(machine.plug(), address);
    }
}
