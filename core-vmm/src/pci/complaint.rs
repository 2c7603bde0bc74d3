//! What is worth a line in the log and can be brought about by a guest as often as it likes.

use std::fmt::Arguments;

/// The complaints about one function: the 1st, 2nd, 4th, 8th ... is logged, so that a guest can't
/// fill the host's log.
#[derive(Debug)]
pub(crate) struct Complaints {
    name: String,
    count: u64,
}

impl Complaints {
    pub(crate) fn about(name: &str) -> Self {
        Self { name: name.to_owned(), count: 0 }
    }

    /// Complains, or keeps silent.
    pub(crate) fn log(&mut self, what: Arguments<'_>) {
        self.count = self.count.saturating_add(1);
        if self.count.is_power_of_two() {
            log::warn!("{}: {what} (complaint {})", self.name, self.count);
        }
    }
}
