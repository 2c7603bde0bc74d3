//! Logging to standard error, one line a record, and how to keep a guest from filling the log.
//!
//! A line carries no time: whoever collects the lines adds it, and a look-up of the time zone
//! would open files that the jail does not allow.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};

struct Logger {
    name: &'static str,
    level: LevelFilter,
    /// For all records together, those of libraries too: the last thing between a guest and the
    /// host's disk. A lock, because every thread logs.
    limit: Mutex<Limit>,
}

impl Logger {
    /// Whether one more record may be written. Who asks for details gets them all.
    fn has_room(&self) -> bool {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        self.level > LevelFilter::Info || limit.allows_of(TOTAL_BURST)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) && self.has_room() {
            let level = record.level().as_str().to_ascii_lowercase();
            say(&format!("{} {level}: {}", self.name, record.args()));
        }
    }

    fn flush(&self) {}
}

/// Sends the process's log to standard error.
pub(crate) fn start(name: &'static str, level: LevelFilter) {
    if log::set_boxed_logger(Box::new(Logger { name, level, limit: Mutex::default() })).is_ok() {
        log::set_max_level(level);
    }
}

/// Writes one line to standard error, whole, whatever the log level.
pub(crate) fn say(line: &str) {
    if io::stderr().write_all(format!("{line}\n").as_bytes()).is_err() {
        // There is nobody left to tell.
    }
}

/// An error and all its sources in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        if write!(line, ": {error}").is_err() {
            break;
        }
        source = error.source();
    }
    line
}

/// How many records of one kind pass in each [`Limit::WINDOW`].
const BURST: u32 = 10;

/// How many records pass in each [`Limit::WINDOW`], whatever they are about.
const TOTAL_BURST: u32 = 100;

/// Lets a few records of one kind pass in each window of time: for what a guest can cause as
/// often as it likes.
#[derive(Debug)]
pub struct Limit {
    window_start: Instant,
    passed: u32,
}

impl Limit {
    /// The length of a window.
    pub const WINDOW: Duration = Duration::from_secs(10);

    /// Whether one more record may be written now.
    pub fn allows(&mut self) -> bool {
        self.allows_of(BURST)
    }

    fn allows_of(&mut self, burst: u32) -> bool {
        self.allows_at(Instant::now(), burst)
    }

    fn allows_at(&mut self, now: Instant, burst: u32) -> bool {
        if now.saturating_duration_since(self.window_start) >= Self::WINDOW {
            *self = Self { window_start: now, passed: 0 };
        }
        self.passed = self.passed.saturating_add(1);
        self.passed <= burst
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self { window_start: Instant::now(), passed: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_lets_a_burst_pass_and_opens_again_in_the_next_window() {
        let mut limit = Limit::default();
        let start = limit.window_start;
        assert_eq!((0..50).filter(|_record| limit.allows_at(start, BURST)).count(), 10);
        assert!(limit.allows_at(start + Limit::WINDOW, BURST));
    }

    #[test]
    fn a_chain_names_every_source_once() {
        let source = io::Error::other("disk on fire");
        let error = crate::device::DeviceError::Host { what: "cannot flush", source };
        assert_eq!(chain(&error), "cannot flush: disk on fire");
    }
}
