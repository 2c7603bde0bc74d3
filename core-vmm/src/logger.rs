//! The log: one line on standard error each, written at once.

use std::io::{Write, stderr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::timing;

use log::{LevelFilter, Log, Metadata, Record};

/// How many lines pass in each window: the last thing between a guest and the host's disk.
const BURST: u32 = 100;
/// The length of a window.
const WINDOW_NS: u64 = 10_000_000_000;

/// The window that now is, and how many lines it had. Two threads that open a window at once may
/// let a few lines more pass, which does no harm.
struct StandardError {
    window: AtomicU64,
    lines: AtomicU32,
}

static LOGGER: StandardError =
    StandardError { window: AtomicU64::new(0), lines: AtomicU32::new(0) };

impl StandardError {
    /// Whether one more line may be written. Who asks for details gets them all.
    fn has_room(&self, now_ns: u64) -> bool {
        if log::max_level() > LevelFilter::Info {
            return true;
        }
        let window = now_ns / WINDOW_NS;
        if self.window.swap(window, Ordering::Relaxed) != window {
            self.lines.store(0, Ordering::Relaxed);
        }
        self.lines.fetch_add(1, Ordering::Relaxed) < BURST
    }
}

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
        if self.enabled(record.metadata()) && self.has_room(timing::now_ns()) {
            let line = format!("nacre-vmm: {}: {}\n", record.level(), record.args());
            // There is nowhere to tell that the log can't be written.
            stderr().write_all(line.as_bytes()).ok();
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_and_the_next_window_is_heard_again() {
        let log = StandardError { window: AtomicU64::new(0), lines: AtomicU32::new(0) };
        let heard = (0..10 * BURST).filter(|_line| log.has_room(WINDOW_NS)).count();
        assert_eq!(u32::try_from(heard), Ok(BURST));
        assert!(log.has_room(2 * WINDOW_NS));
    }
}
