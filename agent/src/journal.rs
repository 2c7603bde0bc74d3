//! The agent's log: the kernel's ring buffer in a guest, standard error elsewhere.
//!
//! Never a container's stream: what containers print belongs to the host alone.

use std::{
    fs::{self, File},
    io::Write,
    os::fd::OwnedFd,
    sync::Mutex,
};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// The longest line: the kernel takes 1,024 bytes less its own prefix.
const LINE_BYTES: usize = 900;

struct Journal {
    /// One write is one line; the lock keeps lines of several threads apart on standard error.
    sink: Mutex<File>,
}

impl Log for Journal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Info || metadata.target().starts_with("nacre")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut text = record.args().to_string().replace(['\n', '\r', '\0'], " ");
        if text.len() > LINE_BYTES {
            text.truncate(text.floor_char_boundary(LINE_BYTES));
        }
        let line = format!("<{}>nacre-agent: {text}\n", priority(record.level()));
        if let Ok(mut sink) = self.sink.lock() {
            // There is no place left to report that reporting failed.
            drop(sink.write_all(line.as_bytes()));
        }
    }

    fn flush(&self) {}
}

/// The kernel's priority number, as in syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

fn install(sink: OwnedFd) {
    let journal = Box::new(Journal { sink: Mutex::new(File::from(sink)) });
    // A second call keeps the first journal, which is as good.
    if log::set_boxed_logger(journal).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Logs to standard error from now on.
pub(crate) fn to_stderr() {
    if let Ok(sink) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3) {
        install(sink);
    }
}

/// Logs to the kernel's ring buffer from now on, or to standard error where there is none.
pub(crate) fn to_kernel() {
    // Without this the kernel drops all but ten lines of five seconds.
    drop(fs::write("/proc/sys/kernel/printk_devkmsg", "on\n"));
    match File::options().write(true).open("/dev/kmsg") {
        Ok(sink) => install(sink.into()),
        Err(_) => to_stderr(),
    }
}
