//! The log: one line on standard error each, written at once.

use std::io::{Write, stderr};

use log::{LevelFilter, Log, Metadata, Record};

struct StandardError;

static LOGGER: StandardError = StandardError;

/// Starts logging what is at least as grave as `level`.
pub fn start(level: LevelFilter) {
    log::set_max_level(level);
    // It fails only if there is a logger already, which then is this one.
    log::set_logger(&LOGGER).ok();
}

impl Log for StandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("nacre-vmm: {}: {}\n", record.level(), record.args());
            // There is nowhere to tell that the log can't be written.
            stderr().write_all(line.as_bytes()).ok();
        }
    }

    fn flush(&self) {}
}
