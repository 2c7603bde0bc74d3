//! The clock on which boot events are told to the supervisor.

use rustix::time::{ClockId, clock_gettime};

/// Now on the host's monotonic clock, in nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock starts at boot and never goes back, so neither part is negative.
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
