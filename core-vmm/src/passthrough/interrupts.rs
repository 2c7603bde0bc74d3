//! A passed-through device's interrupts: from the device to an eventfd, and from there to the guest.
//!
//! ```text
//! device --(VFIO)--> eventfd --(irqfd)--> GSI --> what the guest wrote into its table
//! ```
//!
//! The second half is [`Vectors`], as for a virtio device. The first is switched on when the guest
//! switches its capability on; a vector is asked for when the guest lets it fire for the first
//! time, so that vectors that a driver never uses cost the host nothing. MSI has no table for the
//! guest, so one is filled in here from its capability. While the guest uses neither, the device
//! has its [`Line`], if any.

use std::io;
use std::sync::Arc;

use vfio::config_space::MsiState;
use vfio::{Device, InterruptKind};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::AssignError;
use super::line::Line;
use crate::error_chain;
use crate::interrupt::{MsiRouter, SourceIndex, Vectors};
use crate::pci::complaint::Complaints;
use crate::pci::msix::{ENTRY_LEN_BYTES, Msix, MsixEffect};

/// The control register's bit of MSI-X.
const MSIX_ENABLE: u16 = 1 << 15;

/// The interrupts of one device.
pub(super) struct Interrupts {
    device: Arc<Device>,
    msix: Option<Messages>,
    msi: Option<Messages>,
    line: Option<Line>,
    /// Which of the two the device sends now.
    active: Option<InterruptKind>,
    complaints: Complaints,
}

/// One of the two kinds that are messages.
struct Messages {
    vectors: Vectors,
    /// Which of them the kernel sends to their eventfds.
    sent: Vec<bool>,
}

impl Messages {
    fn new(name: &str, router: &Arc<MsiRouter>, count: u16) -> Result<Self, AssignError> {
        let event = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let events = (0..count).map(event).collect::<Result<_, _>>();
        let events = events.map_err(|source| AssignError::Host { what: "an eventfd", source })?;
        let vectors = Vectors::new(name, Arc::clone(router), events);
        let mut messages = Self { vectors, sent: vec![false; usize::from(count)] };
        messages.assign_all();
        Ok(messages)
    }

    /// Each source fires the vector of its own number.
    fn assign_all(&mut self) {
        for number in 0..self.vectors.msix().vectors() {
            self.vectors.assign(SourceIndex(number), number);
        }
    }

    fn reset(&mut self) {
        self.vectors.reset();
        self.sent.fill(false);
        self.assign_all();
    }

    /// Which vectors the guest lets fire, of those that are not sent yet.
    fn wanted(&self) -> Vec<bool> {
        let fires = |number: u16| self.vectors.msix().message(number).is_some();
        (0..).zip(&self.sent).map(|(number, sent)| !sent && fires(number)).collect()
    }

    fn events(&self, wanted: &[bool]) -> Vec<Option<&EventFd>> {
        let event = |number| self.vectors.event(SourceIndex(number));
        (0..).zip(wanted).map(|(number, wanted)| event(number).filter(|_event| *wanted)).collect()
    }
}

impl Interrupts {
    /// None is sent yet.
    ///
    /// # Errors
    ///
    /// Fails if no descriptor is left.
    pub(super) fn new(
        name: &str,
        device: Arc<Device>,
        router: &Arc<MsiRouter>,
        [msix, msi]: [u16; 2],
        line: Option<Line>,
    ) -> Result<Self, AssignError> {
        // What the configuration promises and VFIO does not have would never fire.
        let messages = |kind, promised: u16| {
            let has = u16::try_from(device.interrupts(kind)).unwrap_or(u16::MAX);
            match promised.min(has) {
                0 => Ok(None),
                count => Messages::new(name, router, count).map(Some),
            }
        };
        let msix = messages(InterruptKind::MsiX, msix)?;
        let msi = messages(InterruptKind::Msi, msi)?;
        let complaints = Complaints::about(name);
        Ok(Self { device, msix, msi, line, active: None, complaints })
    }

    /// The device's line raises this pin from now on.
    pub(super) fn connect_line(&mut self, pin: u32) {
        if let Some(line) = &mut self.line {
            line.set_pin(pin);
        }
        self.follow();
    }

    /// The MSI-X table, as the guest sees it.
    pub(super) fn table(&self) -> Option<&Vectors> {
        self.msix.as_ref().map(|msix| &msix.vectors)
    }

    /// The guest wrote the MSI-X control register or its table.
    pub(super) fn change_msix(&mut self, change: impl FnOnce(&mut Msix) -> MsixEffect) {
        if let Some(msix) = &mut self.msix {
            msix.vectors.change(change);
            self.follow();
        }
    }

    /// The guest wrote the MSI capability.
    pub(super) fn change_msi(&mut self, state: MsiState) {
        let Some(msi) = &mut self.msi else { return };
        msi.vectors.change(|table| fill(table, state));
        self.follow();
    }

    /// Sends what the guest wants to be sent.
    fn follow(&mut self) {
        let is_enabled = |messages: &Option<Messages>| {
            messages.as_ref().is_some_and(|messages| messages.vectors.msix().is_enabled())
        };
        let wanted = if is_enabled(&self.msix) {
            Some(InterruptKind::MsiX)
        } else if is_enabled(&self.msi) {
            Some(InterruptKind::Msi)
        } else {
            None
        };
        if self.active != wanted {
            self.silence_messages();
        }
        let is_first = self.active.is_none();
        match wanted {
            None => self.switch_line(Line::switch_on),
            // The device has one kind at a time.
            Some(_) if is_first => self.switch_line(Line::switch_off),
            Some(_) => {}
        }
        let messages = match wanted {
            Some(InterruptKind::MsiX) => self.msix.as_mut(),
            Some(InterruptKind::Msi) => self.msi.as_mut(),
            _ => None,
        };
        let (Some(kind), Some(messages)) = (wanted, messages) else { return };
        match send(&self.device, kind, messages, is_first) {
            Ok(()) => self.active = Some(kind),
            Err(error) => {
                self.complaints.log(format_args!("{}", error_chain(&error)));
            }
        }
    }

    fn switch_line(&mut self, switch: impl FnOnce(&mut Line) -> io::Result<()>) {
        if let Some(line) = &mut self.line
            && let Err(error) = switch(line)
        {
            self.complaints.log(format_args!("the device's line: {}", error_chain(&error)));
        }
    }

    /// Sends nothing any more.
    pub(super) fn silence(&mut self) {
        self.switch_line(Line::switch_off);
        self.silence_messages();
    }

    fn silence_messages(&mut self) {
        let Some(kind) = self.active.take() else { return };
        if let Err(error) = self.device.silence(kind) {
            self.complaints.log(format_args!("{}", error_chain(&error)));
        }
        for messages in [&mut self.msix, &mut self.msi].into_iter().flatten() {
            messages.sent.fill(false);
        }
    }

    /// Back to power-on, with every vCPU stopped.
    pub(super) fn reset(&mut self) {
        self.silence();
        for messages in [&mut self.msix, &mut self.msi].into_iter().flatten() {
            messages.reset();
        }
    }

    /// The device was reset: its line is all that it has.
    pub(super) fn resume(&mut self) {
        self.follow();
    }
}

/// Has the kernel send the vectors that the guest lets fire now. The first time it is told how many
/// there are at all: it sets aside no more later.
fn send(
    device: &Device,
    kind: InterruptKind,
    messages: &mut Messages,
    is_first: bool,
) -> Result<(), vfio::interrupt::InterruptError> {
    let wanted = messages.wanted();
    if is_first {
        let count = match kind {
            // MSI's are one block, as long as the guest wants it.
            InterruptKind::Msi => wanted.iter().filter(|wanted| **wanted).count(),
            _ => wanted.len(),
        };
        device.send_to(kind, 0, &messages.events(&wanted)[..count])?;
        messages.sent.clone_from(&wanted);
        return Ok(());
    }
    for (number, _wanted) in (0_u16..).zip(&wanted).filter(|(_number, wanted)| **wanted) {
        let event = messages.vectors.event(SourceIndex(number));
        device.send_to(kind, number.into(), &[event])?;
        messages.sent[usize::from(number)] = true;
    }
    Ok(())
}

/// Fills a table in as an MSI capability says: each vector's message is the first one's, with the
/// vector's number in its lowest bits (PCI Local Bus 3.0, section 6.8.1.6).
fn fill(table: &mut Msix, state: MsiState) -> MsixEffect {
    let mut effects = Vec::new();
    for number in 0..table.vectors() {
        let at = u64::from(number) * ENTRY_LEN_BYTES;
        let low = u32::from(state.vectors.max(1) - 1);
        let data = state.data & !low | u32::from(number) & low;
        let masked = u32::from(number >= state.vectors);
        let fields = u64::from(data) | u64::from(masked) << 32;
        effects.push(table.write_table(at, &state.address.to_le_bytes()));
        effects.push(table.write_table(at + 8, &fields.to_le_bytes()));
    }
    effects.push(table.set_control(if state.vectors > 0 { MSIX_ENABLE } else { 0 }));
    let changed = effects.contains(&MsixEffect::Changed);
    if changed { MsixEffect::Changed } else { MsixEffect::None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::msix::MsiMessage;

    #[test]
    fn an_msi_capability_becomes_a_table() {
        let mut table = Msix::new(8);
        let state = MsiState { vectors: 4, address: 0xfee0_1000, data: 0x4043 };
        assert_eq!(fill(&mut table, state), MsixEffect::Changed);
        let message = |data| Some(MsiMessage { address: 0xfee0_1000, data });
        assert_eq!(table.message(0), message(0x4040));
        assert_eq!(table.message(3), message(0x4043));
        assert_eq!(table.message(4), None);
        assert_eq!(fill(&mut table, state), MsixEffect::None);
        assert_eq!(fill(&mut table, MsiState { vectors: 0, ..state }), MsixEffect::Changed);
        assert!(!table.is_enabled());
    }
}
