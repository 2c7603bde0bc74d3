//! vCPUs that come and go.
//!
//! ```text
//! more:   controller says "there" -> its thread is let through the gate -> the guest is told,
//!         starts it by INIT and SIPI, and says so by _OST
//! fewer:  controller says "to go" -> the guest is told, stops it, ejects it -> its thread is
//!         stopped, takes its start state and is kept at the gate
//! ```
//!
//! All vCPUs that there can be are made with their threads before the jail closes: KVM can't take
//! one back in any case, and so neither a system call that makes one nor one that starts a thread
//! is ever allowed. One that is not there can't run, whatever the guest sends it: its thread waits.

use std::{io, sync::Arc};

use nacre_proto::vmm::{Event, Resource};

use crate::{
    acpi::{
        cpu_hotplug::{CpuController, LeavingError, News},
        ged::{self, EventDevice},
    },
    vcpu::Vcpus,
};

/// Why there are not as many vCPUs as was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CpusError {
    /// Not now.
    #[error("no vCPUs can be added yet")]
    Leaving(#[from] LeavingError),
    /// The event device.
    #[error("the guest can't be told")]
    Event(#[source] io::Error),
}

/// The vCPUs of one VM as far as they come and go.
#[derive(Debug)]
pub struct Cpus {
    controller: Arc<CpuController>,
    /// How many the VM began with.
    at_start: u32,
}

impl Cpus {
    /// Those of `controller`.
    #[must_use]
    pub fn new(controller: Arc<CpuController>) -> Self {
        let at_start = controller.present();
        Self { controller, at_start }
    }

    /// What the guest reaches.
    #[must_use]
    pub fn controller(&self) -> &Arc<CpuController> {
        &self.controller
    }

    /// How many there are, with those that are to go.
    #[must_use]
    pub fn present(&self) -> u32 {
        self.controller.present()
    }

    /// How many there can be.
    #[must_use]
    pub fn possible(&self) -> u32 {
        self.controller.possible()
    }

    /// Whether their number can change.
    #[must_use]
    pub fn can_change(&self) -> bool {
        self.at_start < self.possible()
    }

    /// Has so many be there, and tells the guest.
    ///
    /// # Errors
    ///
    /// Fails if some have yet to go and more are wanted, or if the guest can't be told.
    pub fn set(&self, cpus: u32, vcpus: &Vcpus, events: &EventDevice) -> Result<(), CpusError> {
        let change = self.controller.change(cpus)?;
        log::info!("{cpus} vCPUs are wanted; these come: {:?}", change.arrived);
        for index in change.arrived {
            vcpus.admit(index);
        }
        if change.is_news_to_guest {
            events.raise(ged::Event::Cpus).map_err(CpusError::Event)?;
        }
        Ok(())
    }

    /// Does what the guest's ejections ask for; what the supervisor is to know of them and of
    /// refusals.
    #[must_use]
    pub fn process(&self, vcpus: &Vcpus) -> Vec<Event> {
        let mut events = Vec::new();
        let mut has_ejected = false;
        for news in self.controller.take_news() {
            match news {
                News::Ejected(index) => {
                    vcpus.park(index);
                    self.controller.parked(index);
                    log::info!("the guest has ejected vCPU {index}");
                    has_ejected = true;
                }
                News::Declined { index, was_to_go, status } => {
                    let what = if was_to_go { "keeps" } else { "can't use" };
                    let reason = format!("the guest {what} vCPU {index}: status {status:#x}");
                    log::warn!("{reason}");
                    events.push(Event::Declined { what: Resource::Cpus, reason });
                }
            }
        }
        if has_ejected {
            events.push(Event::CpusChanged { cpus: self.present() });
        }
        events
    }

    /// Ends what is pending, with every vCPU stopped: those that were to go are gone, and the guest
    /// has the first ones. What the supervisor is to know of it.
    #[must_use]
    pub fn reset(&self, vcpus: &Vcpus) -> Option<Event> {
        let before = self.present();
        let cpus = self.controller.reset();
        vcpus.admit_first(cpus);
        (cpus != before).then_some(Event::CpusChanged { cpus })
    }
}
