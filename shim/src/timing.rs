//! When each part of a sandbox's life was reached, and how often the guest was left for what, for
//! `nacre run --timing`.
//!
//! All moments are the host's. The VMM's come from its own main function and from just before it
//! lets the vCPUs run. That the guest's user space began, [`INIT`], is the agent's word: it tells
//! how long it has been running, and is heard a little later, so the moment is late by the way of
//! one message at most.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use nacre_proto::vmm::Status;
use rustix::time::{ClockId, clock_gettime};

use crate::log_file::printable;

/// The most figures that are shown of those that KVM has.
const MAX_FIGURES: usize = 32;
/// The supervisor has started the VMM's process.
pub(crate) const VMM_START: &str = "VMM start";
/// The VMM's own code runs.
const VMM_MAIN: &str = "VMM's main";
/// The vCPUs are let run.
const FIRST_RUN: &str = "first KVM_RUN";
/// The guest's process 1 runs.
const INIT: &str = "init";
/// The agent has answered.
const AGENT_READY: &str = "agent ready";
/// The container's program runs.
pub(crate) const CONTAINER_STARTED: &str = "container started";

/// The moments of one start, in the order they came.
#[derive(Clone, Debug)]
pub struct Timeline {
    start: Instant,
    // The same moment on the clock that other processes report by.
    start_ns: u64,
    events: Vec<(String, Duration)>,
    notes: Vec<String>,
}

impl Timeline {
    /// A timeline that starts now.
    #[must_use]
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            start_ns: monotonic_ns(),
            events: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Records that `event` happened at `monotonic_ns` of the host's monotonic clock, once.
    fn mark_at(&mut self, event: &str, monotonic_ns: u64) {
        let after = Duration::from_nanos(monotonic_ns.saturating_sub(self.start_ns));
        self.insert(event, after);
    }

    fn insert(&mut self, event: &str, after: Duration) {
        if !self.events.iter().any(|(other, _)| other == event) {
            self.events.push((event.to_owned(), after));
            self.events.sort_by_key(|(_, after)| *after);
        }
    }

    /// The agent has answered; `began` is when it says that it began. What can't be is left out:
    /// the guest's word may be anything.
    pub fn agent_ready(&mut self, began: Option<Instant>) {
        let before = self.events.last().map_or(Duration::ZERO, |(_, after)| *after);
        self.mark(AGENT_READY);
        match began.and_then(|began| began.checked_duration_since(self.start)) {
            Some(after) if after >= before => self.insert(INIT, after),
            _ => log::debug!("the agent does not say when it began"),
        }
    }

    /// Takes over what the VMM has measured `until` something.
    pub fn take(&mut self, status: &Status, until: &str) {
        self.mark_at(VMM_MAIN, status.timing.started_ns);
        self.mark_at(FIRST_RUN, status.timing.first_run_ns);
        let exits = status.exits;
        self.notes.push(format!(
            "exits to user space {until}: {} port reads, {} port writes, {} MMIO reads, {} MMIO \
             writes, {} others",
            exits.pio_reads, exits.pio_writes, exits.mmio_reads, exits.mmio_writes, exits.others
        ));
        match &status.kvm {
            None => self.notes.push(format!("KVM {until}: this host gives no statistics")),
            Some(figures) => {
                let figures = figures.iter().filter(|(_, count)| **count != 0).take(MAX_FIGURES);
                let figures: Vec<_> =
                    figures.map(|(name, count)| format!("{count} {}", printable(name))).collect();
                self.notes.push(format!("KVM {until}: {}", figures.join(", ")));
            }
        }
    }

    /// Records that `event` happened now.
    pub fn mark(&mut self, event: &str) {
        let after = self.start.elapsed();
        log::debug!("{event} after {after:.3?}");
        self.events.push((event.to_owned(), after));
    }

    /// One line an event: milliseconds since the start, milliseconds since the one before, name.
    #[must_use]
    pub fn table(&self) -> String {
        let mut before = Duration::ZERO;
        let mut table = String::new();
        for (event, after) in &self.events {
            let step = after.saturating_sub(before);
            if writeln!(table, "{:>9} ms  +{:>8} ms  {event}", millis(*after), millis(step))
                .is_err()
            {
                log::debug!("a line of the timing table was lost");
            }
            before = *after;
        }
        table.extend(self.notes.iter().flat_map(|note| [note, "\n"]));
        table
    }
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

fn millis(duration: Duration) -> String {
    format!("{}.{}", duration.as_millis(), duration.as_micros() % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nacre_proto::vmm::{Exits, State, Timing};

    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_event() {
        let mut timeline = Timeline::start();
        timeline.mark(VMM_START);
        let began = Instant::now();
        timeline.agent_ready(Some(began));
        let started_ns = timeline.start_ns;
        let status = Status {
            state: State::Running,
            cpus: 1,
            max_cpus: 1,
            memory_bytes: 1,
            max_memory_bytes: 1,
            resets: 0,
            timing: Timing { started_ns, first_run_ns: started_ns },
            exits: Exits { pio_reads: 3, ..Exits::default() },
            kvm: Some(BTreeMap::from(
                [("exits", 7), ("hypercalls", 0)].map(|(n, c)| (n.into(), c)),
            )),
            devices: Vec::new(),
        };
        timeline.take(&status, "so far");
        timeline.take(&Status { kvm: None, ..status }, "in all");
        let table = timeline.table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 9, "{table}");
        let events = [VMM_MAIN, FIRST_RUN, VMM_START, INIT, AGENT_READY];
        assert!(events.iter().zip(&lines).all(|(event, line)| line.ends_with(event)), "{table}");
        assert!(lines[5].starts_with("exits to user space so far: 3 port reads, "), "{table}");
        assert_eq!(lines[6], "KVM so far: 7 exits");
        assert_eq!(lines[8], "KVM in all: this host gives no statistics");
    }

    #[test]
    fn what_an_agent_cannot_mean_is_left_out() {
        let now = Instant::now();
        for began in [None, Some(now), now.checked_sub(Duration::from_secs(1))] {
            let mut timeline = Timeline::start();
            timeline.mark(VMM_START);
            timeline.agent_ready(began);
            assert_eq!(timeline.table().lines().count(), 2, "{began:?}");
        }
    }
}
