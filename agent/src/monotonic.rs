//! Moments on the guest's own clock, as the host is told of them.

use rustix::time::{ClockId, clock_gettime};

/// A moment of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Monotonic {
    ns: u64,
}

impl Monotonic {
    /// This moment.
    pub(crate) fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let part = |part: i64| u64::try_from(part).unwrap_or_default();
        Self { ns: part(now.tv_sec).saturating_mul(1_000_000_000) + part(now.tv_nsec) }
    }

    /// In nanoseconds since the clock's start.
    pub(crate) fn ns(self) -> u64 {
        self.ns
    }
}
