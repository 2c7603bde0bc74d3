//! The life of a process, as a value and one transition function.
//!
//! ```text
//! Created --Start--> Starting --Executed--> Running --.
//!    |                  |                             | Ended
//!    `------------------+-----------------------------+--> Ended
//! ```
//! A container's init has a pid from the beginning: it waits before its execve. A process that was
//! added has none until it runs.

use std::{os::fd::OwnedFd, sync::Arc};

use rustix::process::Pid;

/// A process that the kernel knows.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    /// Its number in the agent's PID namespace.
    pub(crate) pid: Pid,
    /// The process itself: signals through this never meet a recycled number.
    pub(crate) pidfd: Arc<OwnedFd>,
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The code given to exit(2), or 128 + signal.
    pub(crate) code: u32,
    /// The signal that ended it, or 0.
    pub(crate) signal: u32,
    /// Nanoseconds since the Unix epoch.
    pub(crate) at_ns: u64,
    /// The out-of-memory killer struck in its container.
    pub(crate) oom_killed: bool,
}

/// Where a process is in its life.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// Not started.
    Created(Option<Live>),
    /// Start was asked for; execve has not answered.
    Starting(Option<Live>),
    /// Its program runs.
    Running(Live),
    /// Over.
    Ended(Exit),
}

/// What happens to a process.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// The host asks to start it.
    Start,
    /// execve succeeded.
    Executed(Live),
    /// It ended, or never came to be.
    Ended(Exit),
}

/// The event makes no sense in this state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IllegalEvent {
    /// Start was asked for before.
    #[error("the process was started before")]
    StartedBefore,
    /// Over is over.
    #[error("the process has ended")]
    Over,
    /// An execve that nobody asked for.
    #[error("the process was not being started")]
    NotStarting,
}

impl State {
    /// The state after `event`.
    pub(crate) fn after(&self, event: Event) -> Result<Self, IllegalEvent> {
        match (self, event) {
            (Self::Created(live), Event::Start) => Ok(Self::Starting(live.clone())),
            (Self::Starting(_), Event::Executed(live)) => Ok(Self::Running(live)),
            // A short program may be over before the news of its execve is through.
            (Self::Ended(exit), Event::Executed(_)) => Ok(Self::Ended(*exit)),
            (Self::Created(_) | Self::Starting(_) | Self::Running(_), Event::Ended(exit)) => {
                Ok(Self::Ended(exit))
            }
            (Self::Starting(_) | Self::Running(_), Event::Start) => {
                Err(IllegalEvent::StartedBefore)
            }
            (Self::Ended(_), Event::Start | Event::Ended(_)) => Err(IllegalEvent::Over),
            (Self::Created(_) | Self::Running(_), Event::Executed(_)) => {
                Err(IllegalEvent::NotStarting)
            }
        }
    }

    /// The process as the kernel knows it, if it does.
    pub(crate) fn live(&self) -> Option<&Live> {
        match self {
            Self::Created(live) | Self::Starting(live) => live.as_ref(),
            Self::Running(live) => Some(live),
            Self::Ended(_) => None,
        }
    }

    /// How it ended, if it did.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match self {
            Self::Ended(exit) => Some(*exit),
            Self::Created(_) | Self::Starting(_) | Self::Running(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn live() -> Live {
        let fd = File::open("/dev/null").unwrap();
        Live { pid: Pid::INIT, pidfd: Arc::new(fd.into()) }
    }

    const EXIT: Exit = Exit { code: 3, signal: 0, at_ns: 1, oom_killed: false };

    /// The state's name after each event, or why not, in the order of the events.
    fn row(state: &State) -> [&'static str; 3] {
        [Event::Start, Event::Executed(live()), Event::Ended(EXIT)].map(|event| {
            match state.after(event) {
                Ok(State::Created(_)) => "created",
                Ok(State::Starting(_)) => "starting",
                Ok(State::Running(_)) => "running",
                Ok(State::Ended(_)) => "ended",
                Err(IllegalEvent::StartedBefore) => "!before",
                Err(IllegalEvent::Over) => "!over",
                Err(IllegalEvent::NotStarting) => "!not starting",
            }
        })
    }

    #[test]
    fn every_state_answers_every_event() {
        assert_eq!(row(&State::Created(None)), ["starting", "!not starting", "ended"]);
        assert_eq!(row(&State::Starting(None)), ["!before", "running", "ended"]);
        assert_eq!(row(&State::Running(live())), ["!before", "!not starting", "ended"]);
        assert_eq!(row(&State::Ended(EXIT)), ["!over", "ended", "!over"]);
    }

    #[test]
    fn only_a_process_that_the_kernel_knows_can_be_signalled() {
        assert!(State::Created(None).live().is_none());
        assert!(State::Created(Some(live())).live().is_some());
        assert!(State::Ended(EXIT).live().is_none());
        assert_eq!(State::Ended(EXIT).exit(), Some(EXIT));
    }
}
