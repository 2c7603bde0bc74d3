//! How soon a device gets its next process, and when there is none any more. Pure.

use std::time::{Duration, Instant};

/// A process that served for so long is no failure in a row, however it ended.
const SERVED: Duration = Duration::from_millis(100);
/// So many failures in a row are too many.
const MOST_FAILURES: u32 = 12;
/// The pause after the first failure; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// The pause after a process that was killed before it served.
const KILLED_PAUSE: Duration = Duration::from_millis(100);

/// So many ends of themselves of processes that served are too many, if each was forgotten as
/// slowly as [`FORGOTTEN_AFTER`] says.
const MOST_CRASHES: u32 = 20;
/// How long it takes until one crash less is remembered.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);

/// Why a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Of itself, or because it was not as it should be.
    Own,
    /// Somebody sent SIGKILL, which says nothing about its program.
    Killed,
}

/// What is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Enough {
    /// So many processes failed one after the other.
    #[error("{0} failures in a row")]
    InARow(u32),
    /// Processes served, and ended of themselves, so many times more than are forgotten meanwhile.
    #[error("{0} crashes in a short time")]
    Crashes(u32),
}

/// Counts failures: processes that came to their end of themselves before they served, or just
/// after. And crashes: those that served, and then ended of themselves.
///
/// The successor of a process that served starts at once, until there were twenty crashes beside
/// one each half minute: a guest that brings its device down over and over does so for some time
/// only. In a row of failures the pauses double, so twelve of them, after which the device is
/// given up, take some fourteen seconds and what the processes themselves take. Whoever is killed
/// is replaced for as long as somebody goes on killing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Patience {
    failures: u32,
    /// Those that are not forgotten.
    crashes: u32,
    /// Since when the oldest of them is being forgotten.
    forgetting: Option<Instant>,
}

impl Patience {
    /// Takes the end, now, of a process that served for `served`. Answers how long to wait before
    /// the next one is started.
    ///
    /// # Errors
    ///
    /// Says what is too much, if there is to be no next one.
    pub(super) fn on_end(
        &mut self,
        now: Instant,
        served: Duration,
        cause: Cause,
    ) -> Result<Duration, Enough> {
        match (served >= SERVED, cause) {
            (true, cause) => {
                self.failures = 0;
                if cause == Cause::Own { self.crash(now) } else { Ok(Duration::ZERO) }
            }
            (false, Cause::Killed) => Ok(KILLED_PAUSE),
            (false, Cause::Own) => {
                self.failures += 1;
                if self.failures >= MOST_FAILURES {
                    return Err(Enough::InARow(self.failures));
                }
                Ok((FIRST_PAUSE * 2_u32.pow(self.failures - 1)).min(LONGEST_PAUSE))
            }
        }
    }

    fn crash(&mut self, now: Instant) -> Result<Duration, Enough> {
        let mut since = self.forgetting.unwrap_or(now);
        while self.crashes > 0 && now.duration_since(since) >= FORGOTTEN_AFTER {
            self.crashes -= 1;
            since += FORGOTTEN_AFTER;
        }
        self.forgetting = Some(if self.crashes == 0 { now } else { since });
        self.crashes += 1;
        if self.crashes < MOST_CRASHES {
            Ok(Duration::ZERO)
        } else {
            Err(Enough::Crashes(self.crashes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn pauses_double_up_to_a_few_seconds_and_then_it_is_enough() {
        let mut patience = Patience::default();
        assert_eq!(patience.on_end(now(), SERVED, Cause::Own), Ok(Duration::ZERO));
        let mut pauses = Vec::new();
        while let Ok(pause) = patience.on_end(now(), Duration::ZERO, Cause::Own) {
            pauses.push(u64::try_from(pause.as_millis()).unwrap());
        }
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1280, 2560, 3000, 3000, 3000]);
        let end = patience.on_end(now(), Duration::ZERO, Cause::Own);
        assert_eq!(end, Err(Enough::InARow(13)));
    }

    #[test]
    fn whoever_is_killed_is_replaced_however_often() {
        let mut patience = Patience::default();
        let now = now();
        for _ in 0..1000 {
            assert_eq!(patience.on_end(now, Duration::ZERO, Cause::Killed), Ok(KILLED_PAUSE));
            assert_eq!(patience.on_end(now, SERVED, Cause::Killed), Ok(Duration::ZERO));
        }
        assert_eq!(patience, Patience::default());
    }

    #[test]
    fn whoever_served_ends_a_row_of_failures() {
        let mut patience = Patience::default();
        for _ in 0..5 {
            patience.on_end(now(), Duration::ZERO, Cause::Own).unwrap();
        }
        assert_eq!(patience.on_end(now(), SERVED, Cause::Killed), Ok(Duration::ZERO));
        assert_eq!(patience.on_end(now(), SERVED / 2, Cause::Own), Ok(FIRST_PAUSE));
    }

    #[test]
    fn who_serves_and_crashes_over_and_over_is_replaced_at_once_and_after_a_while_no_more() {
        let mut patience = Patience::default();
        let now = now();
        for _ in 1..MOST_CRASHES {
            assert_eq!(patience.on_end(now, SERVED, Cause::Own), Ok(Duration::ZERO));
        }
        let end = patience.on_end(now + FORGOTTEN_AFTER / 2, SERVED, Cause::Own);
        assert_eq!(end, Err(Enough::Crashes(MOST_CRASHES)));
    }

    #[test]
    fn a_crash_now_and_then_is_forgotten() {
        let mut patience = Patience::default();
        let start = now();
        for _ in 2..MOST_CRASHES {
            patience.on_end(start, SERVED, Cause::Own).unwrap();
        }
        for number in 1..1000 {
            let now = start + FORGOTTEN_AFTER * number;
            assert_eq!(patience.on_end(now, SERVED, Cause::Own), Ok(Duration::ZERO));
        }
        let much_later = start + FORGOTTEN_AFTER * 10_000;
        patience.on_end(much_later, SERVED, Cause::Own).unwrap();
        assert_eq!(patience.crashes, 1);
    }
}
