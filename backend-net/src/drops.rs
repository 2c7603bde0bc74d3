//! Counts what was dropped and says so rarely: a guest must not be able to flood the log.

use backend_daemon::logging::Limit;

/// A count of dropped frames of one kind.
#[derive(Debug)]
pub(crate) struct Drops {
    what: &'static str,
    count: u64,
    limit: Limit,
}

impl Drops {
    /// `what` says in the log what is dropped, for example "frames out".
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, count: 0, limit: Limit::default() }
    }

    /// One more, for `reason`.
    pub(crate) fn add(&mut self, reason: &dyn std::fmt::Display) {
        self.count = self.count.saturating_add(1);
        if self.limit.allows() {
            log::warn!(
                "dropped {} {} so far, the last one because {reason}",
                self.count,
                self.what
            );
        }
    }

    /// How many there were.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
}
