//! What a supervisor does with the signals it gets: pass them on, and lose patience. Pure.

use std::time::{Duration, Instant};

/// How long a container may ignore that it is to end.
const PATIENCE: Duration = Duration::from_secs(10);
const SIGINT: i32 = libc::SIGINT;
const SIGTERM: i32 = libc::SIGTERM;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reaction {
    /// Pass it to the container's init.
    Forward(i32),
    /// End the container by force.
    Kill,
    /// Take everything down at once.
    TearDown,
}

/// How patient the supervisor still is.
///
/// ```text
///   Calm -- SIGINT, SIGTERM: forward -> Asked -- another, or 10 s: kill -> Forced -- another: tear down
/// ```
///
/// Other signals are forwarded in every state. That nobody reads the output any more counts as
/// being asked: the container's program learns of it from its broken pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// Nobody wants the container to end.
    Calm,
    /// It was asked to end.
    Asked {
        /// When it is ended by force.
        until: Instant,
    },
    /// It is being ended by force.
    Forced,
}

impl Patience {
    /// Takes a signal.
    #[must_use]
    pub(super) fn on_signal(self, signal: i32, now: Instant) -> (Self, Reaction) {
        let ends = matches!(signal, SIGINT | SIGTERM);
        match (self, ends) {
            (state, false) => (state, Reaction::Forward(signal)),
            (Self::Calm, true) => {
                (Self::Asked { until: now + PATIENCE }, Reaction::Forward(signal))
            }
            (Self::Asked { .. }, true) => (Self::Forced, Reaction::Kill),
            (Self::Forced, true) => (Self::Forced, Reaction::TearDown),
        }
    }

    /// The reader of the container's output is gone.
    #[must_use]
    pub(super) fn on_unread(self, now: Instant) -> Self {
        match self {
            Self::Calm => Self::Asked { until: now + PATIENCE },
            state @ (Self::Asked { .. } | Self::Forced) => state,
        }
    }

    /// When to call [`Self::on_deadline`], if at all.
    #[must_use]
    pub(super) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Asked { until } => Some(until),
            Self::Calm | Self::Forced => None,
        }
    }

    /// The deadline has come.
    #[must_use]
    pub(super) fn on_deadline(self) -> (Self, Reaction) {
        (Self::Forced, Reaction::Kill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reacts_to_every_signal_as_documented() {
        let now = Instant::now();
        let asked = Patience::Asked { until: now + PATIENCE };
        for ends in [SIGINT, SIGTERM] {
            assert_eq!(Patience::Calm.on_signal(ends, now), (asked, Reaction::Forward(ends)));
            assert_eq!(asked.on_signal(ends, now), (Patience::Forced, Reaction::Kill));
            let forced = (Patience::Forced, Reaction::TearDown);
            assert_eq!(Patience::Forced.on_signal(ends, now), forced);
        }
        for other in [libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1] {
            for state in [Patience::Calm, asked, Patience::Forced] {
                assert_eq!(state.on_signal(other, now), (state, Reaction::Forward(other)));
            }
        }
    }

    #[test]
    fn patience_ends_once() {
        let now = Instant::now();
        let asked = Patience::Calm.on_signal(SIGTERM, now).0;
        assert_eq!(asked.deadline(), Some(now + PATIENCE));
        let (forced, reaction) = asked.on_deadline();
        assert_eq!((forced.deadline(), reaction), (None, Reaction::Kill));
        assert_eq!(Patience::Calm.deadline(), None);
    }

    #[test]
    fn output_that_nobody_reads_ends_patience_and_never_prolongs_it() {
        let now = Instant::now();
        let asked = Patience::Calm.on_unread(now);
        assert_eq!(asked, Patience::Asked { until: now + PATIENCE });
        assert_eq!(asked.on_unread(now + PATIENCE), asked);
        assert_eq!(Patience::Forced.on_unread(now), Patience::Forced);
    }
}
