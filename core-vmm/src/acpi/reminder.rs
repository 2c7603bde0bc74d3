//! When the guest is told again of what it has not looked at.
//!
//! KVM forgets an edge on a pin of the I/O APIC that is masked, as it is until the guest's event
//! driver starts. What was told between the guest's own look at the machine and that moment would be
//! seen with the next event only. So the interrupt is raised again as long as the event register is
//! unread, each time after twice as long: a guest without such a driver costs next to nothing.

use std::time::{Duration, Instant};

/// The first pause: longer than a running guest takes, shorter than anybody waits for a device.
const FIRST: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// What is to be done now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// The interrupt is to be raised again.
    pub again: bool,
    /// When to look next, if nothing else happens; never where nothing is unread.
    pub look_in: Option<Duration>,
}

/// The pause that runs.
#[derive(Debug, Default)]
pub struct Reminder {
    /// Its length, and when it is over. None while nothing is unread.
    pause: Option<(Duration, Instant)>,
}

impl Reminder {
    /// Looks whether the guest has to be told again.
    pub fn look(&mut self, is_unread: bool, now: Instant) -> Due {
        if !is_unread {
            self.pause = None;
            return Due::default();
        }
        let (pause, again) = match self.pause {
            None => (FIRST, false),
            Some((_, over)) if now < over => {
                return Due { again: false, look_in: Some(over.duration_since(now)) };
            }
            Some((pause, _)) => (pause.saturating_mul(2).min(LONGEST), true),
        };
        self.pause = Some((pause, now + pause));
        Due { again, look_in: Some(pause) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_looks_is_not_told_again() {
        let (mut reminder, now) = (Reminder::default(), Instant::now());
        assert_eq!(reminder.look(false, now), Due::default());
        assert_eq!(reminder.look(true, now), Due { again: false, look_in: Some(FIRST) });
        let later = now + FIRST / 2;
        assert_eq!(reminder.look(true, later), Due { again: false, look_in: Some(FIRST / 2) });
        assert_eq!(reminder.look(false, now + FIRST * 3), Due::default());
        // What comes later has its own pause.
        let then = now + FIRST * 4;
        assert_eq!(reminder.look(true, then), Due { again: false, look_in: Some(FIRST) });
    }

    #[test]
    fn a_guest_that_never_looks_is_told_ever_more_seldom() {
        let (mut reminder, mut now) = (Reminder::default(), Instant::now());
        reminder.look(true, now);
        let mut pause = FIRST;
        for _ in 0..20 {
            now += pause;
            pause = (pause * 2).min(LONGEST);
            assert_eq!(reminder.look(true, now), Due { again: true, look_in: Some(pause) });
        }
        assert_eq!(pause, LONGEST);
    }
}
