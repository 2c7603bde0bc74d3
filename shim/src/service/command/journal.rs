//! The serving process's log: lines on standard error, which is containerd's fifo, in the form of its
//! own log. A line that the fifo has no room for is lost.

use std::io::{self, Write};

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Journal {
    id: String,
}

impl Log for Journal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("shim") || metadata.target().starts_with("containerd_shim")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug => "debug",
            Level::Trace => "trace",
        };
        // Written at once, so that lines of several threads don't mix.
        let line = format!(
            "level={level} msg={:?} id={} runtime={}\n",
            record.args().to_string(),
            self.id,
            super::RUNTIME
        );
        if io::stderr().write_all(line.as_bytes()).is_err() {
            // Nowhere is left to say so.
        }
    }

    fn flush(&self) {}
}

/// To be called once.
pub(super) fn init(id: &str, debug: bool) {
    if log::set_boxed_logger(Box::new(Journal { id: id.to_owned() })).is_ok() {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    }
}
