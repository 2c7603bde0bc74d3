//! How soon a device gets its next process, and when there is none any more. Pure.

use std::time::Duration;

/// A process that served for so long was no failure, however it ended.
const SERVED: Duration = Duration::from_millis(100);
/// So many failures in a row are too many.
const MOST_FAILURES: u32 = 12;
/// The pause after the first failure; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// The pause after a process that was killed before it served.
const KILLED_PAUSE: Duration = Duration::from_millis(100);

/// Why a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Of itself, or because it was not as it should be.
    Own,
    /// Somebody sent SIGKILL, which says nothing about its program.
    Killed,
}

/// Counts failures: processes that came to their end of themselves before they served, or just
/// after.
///
/// The successor of a process that served starts at once. In a row of failures the pauses double,
/// so twelve of them, after which the device is given up, take some fourteen seconds and what the
/// processes themselves take. Whoever is killed is replaced for as long as somebody goes on killing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Patience {
    failures: u32,
}

impl Patience {
    /// Takes the end of a process that served for `served`. Answers how long to wait before the
    /// next one is started; `None`: no more.
    pub(super) fn on_end(&mut self, served: Duration, cause: Cause) -> Option<Duration> {
        if served >= SERVED {
            self.failures = 0;
            return Some(Duration::ZERO);
        }
        if cause == Cause::Killed {
            return Some(KILLED_PAUSE);
        }
        self.failures += 1;
        let doubled = FIRST_PAUSE * 2_u32.pow(self.failures.min(MOST_FAILURES) - 1);
        (self.failures < MOST_FAILURES).then(|| doubled.min(LONGEST_PAUSE))
    }

    /// How many failures there were in a row.
    pub(super) fn failures(self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_few_seconds_and_then_it_is_enough() {
        let mut patience = Patience::default();
        assert_eq!(patience.on_end(SERVED, Cause::Own), Some(Duration::ZERO));
        let mut pauses = Vec::new();
        while let Some(pause) = patience.on_end(Duration::ZERO, Cause::Own) {
            pauses.push(u64::try_from(pause.as_millis()).unwrap());
        }
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1280, 2560, 3000, 3000, 3000]);
        assert_eq!((patience.failures(), patience.on_end(Duration::ZERO, Cause::Own)), (12, None));
    }

    #[test]
    fn whoever_is_killed_is_replaced_however_often() {
        let mut patience = Patience::default();
        for _ in 0..1000 {
            assert_eq!(patience.on_end(Duration::ZERO, Cause::Killed), Some(KILLED_PAUSE));
        }
        assert_eq!(patience.failures(), 0);
    }

    #[test]
    fn whoever_served_is_replaced_at_once_however_often() {
        let mut patience = Patience::default();
        for _ in 0..5 {
            patience.on_end(Duration::ZERO, Cause::Own);
        }
        for _ in 0..1000 {
            assert_eq!(patience.on_end(SERVED, Cause::Own), Some(Duration::ZERO));
        }
        assert_eq!(patience.on_end(SERVED / 2, Cause::Own), Some(FIRST_PAUSE));
    }
}
