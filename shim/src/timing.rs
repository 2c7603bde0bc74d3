//! When each part of a sandbox's start was reached, for `nacre run --timing`.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

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

    /// Records that `event` happened at `monotonic_ns` of the host's monotonic clock.
    pub fn mark_at(&mut self, event: &str, monotonic_ns: u64) {
        let after = Duration::from_nanos(monotonic_ns.saturating_sub(self.start_ns));
        self.events.push((event.to_owned(), after));
        self.events.sort_by_key(|(_, after)| *after);
    }

    /// Adds a line to the end of the table.
    pub fn note(&mut self, note: String) {
        self.notes.push(note);
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
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_event() {
        let mut timeline = Timeline::start();
        timeline.mark("VMM started");
        timeline.mark("agent ready");
        timeline.mark_at("before all", 0);
        timeline.note("a note".to_owned());
        let table = timeline.table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[0].ends_with("before all") && lines[2].ends_with("agent ready"));
        assert_eq!(lines[3], "a note");
    }
}
