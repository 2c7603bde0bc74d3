//! The VM's routing table: which GSI sends which message.
//!
//! KVM only takes the whole table, and taking it makes every vCPU wait for a grace period; so
//! nothing is told that did not change, and several changes are told at once.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::{Gsi, Irqchip, MsiMessage, MsiRoute};
use crate::locked;

/// The first GSI after the pins of the in-kernel IOAPIC.
const FIRST_GSI: u32 = 24;
/// How many entries KVM's table takes (KVM_MAX_IRQ_ROUTES on x86), less those of the pins: IOAPIC
/// 24 and PIC 16.
pub const MAX_GSI_COUNT: u32 = 4096 - 40;

/// Why a vector can't have a route.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// All lines are given out.
    #[error("all {MAX_GSI_COUNT} interrupt routes are in use")]
    Exhausted,
    /// The kernel refuses a message.
    #[error("the kernel refuses the interrupt routes")]
    Refused(#[source] io::Error),
}

/// The routing table, shared by all functions of a VM.
pub struct MsiRouter {
    irqchip: Arc<dyn Irqchip>,
    /// Locked by any function whose vectors change, from any vCPU's thread.
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Every line that is given out, with its message once it has one.
    lines: BTreeMap<u32, Option<MsiMessage>>,
}

impl Table {
    fn routes(&self) -> Vec<MsiRoute> {
        self.lines
            .iter()
            .filter_map(|(gsi, message)| Some(MsiRoute { gsi: Gsi(*gsi), message: (*message)? }))
            .collect()
    }
}

impl MsiRouter {
    /// A table with no MSI in it; nothing is told to the kernel yet.
    #[must_use]
    pub fn new(irqchip: Arc<dyn Irqchip>) -> Self {
        Self { irqchip, table: Mutex::default() }
    }

    /// Gives out a line.
    ///
    /// # Errors
    ///
    /// Fails if none is left.
    pub fn allocate(&self) -> Result<Gsi, RouteError> {
        let mut table = locked(&self.table);
        let gsi = (FIRST_GSI..FIRST_GSI + MAX_GSI_COUNT)
            .find(|gsi| !table.lines.contains_key(gsi))
            .ok_or(RouteError::Exhausted)?;
        table.lines.insert(gsi, None);
        Ok(Gsi(gsi))
    }

    /// How many lines are given out.
    #[must_use]
    pub fn in_use(&self) -> usize {
        locked(&self.table).lines.len()
    }

    /// Takes lines back; nothing may be bound to them any more.
    pub fn release(&self, lines: &[Gsi]) {
        let mut table = locked(&self.table);
        let mut dropped = false;
        for gsi in lines {
            dropped |= table.lines.remove(&gsi.0).flatten().is_some();
        }
        if dropped && let Err(error) = self.irqchip.set_routes(&table.routes()) {
            // The lines are no longer bound, so that a stale route sends nothing.
            log::warn!("cannot drop interrupt routes: {error}");
        }
    }

    /// Sets the messages of lines that were given out.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses; the table is then as before.
    pub fn route(&self, routes: &[MsiRoute]) -> Result<(), RouteError> {
        let mut table = locked(&self.table);
        let mut before = Vec::new();
        for route in routes {
            let message = table.lines.entry(route.gsi.0).or_default();
            if *message != Some(route.message) {
                before.push((route.gsi.0, message.replace(route.message)));
            }
        }
        if before.is_empty() {
            return Ok(());
        }
        self.irqchip.set_routes(&table.routes()).map_err(|error| {
            table.lines.extend(before);
            RouteError::Refused(error)
        })
    }

    pub(super) fn bind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        self.irqchip.bind(event, gsi)
    }

    pub(super) fn unbind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        self.irqchip.unbind(event, gsi)
    }
}

impl std::fmt::Debug for MsiRouter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MsiRouter").finish_non_exhaustive()
    }
}
