//! Log records go to standard error, one line each.

use std::io::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What the libraries have to say is of use only to who looks at everything.
        let ours = metadata.target().starts_with("shim") || metadata.target().starts_with("nacre");
        ours || log::max_level() == LevelFilter::Trace
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();

            if writeln!(io::stderr(), "nacre: {level}: {}", record.args()).is_err() {
                // Nowhere is left to say so.
            }
        }
    }

    fn flush(&self) {}
}

/// To be called once.
pub(crate) fn init(level: LevelFilter) {
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(level);
    }
}
