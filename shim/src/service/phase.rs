//! The states of a process that containerd knows, of a container's init and of an added one alike,
//! and what is legal in which.
//!
//! ```text
//!             start            started            pause             paused
//!   Created ---------> Starting ------> Running ---------> Pausing ------> Paused
//!      |                  |              ^  ^ <--- failed ----'               | resume
//!      |                  |      resumed |  '-------------- Resuming <--------'
//!      | delete           | failed       |
//!      v                  v     ended    v
//!   Deleting <-------- Stopped <--- (any of them)
//! ```
//!
//! Pure: who asks applies the answer, and holds no lock over what it then does in the guest.

use std::fmt;

use containerd_shim_protos::api::Status;

/// Where a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Created,
    Starting,
    Running,
    Pausing,
    Paused,
    Resuming,
    Stopped,
    Deleting,
}

/// What can be asked of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Start,
    Kill,
    /// Of an init: another process in its container.
    Exec,
    /// Of an init: that such a process starts.
    StartExec,
    Pause,
    Resume,
    Update,
    Resize,
    Delete,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Started,
    Paused,
    PauseFailed,
    Resumed,
    ResumeFailed,
    /// The process has ended, or never began.
    Ended,
}

impl Phase {
    /// All of them, for tests.
    #[cfg(test)]
    pub(super) const ALL: [Self; 8] = [
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
        Self::Stopped,
        Self::Deleting,
    ];

    /// The phase while `request` is carried out; `None` if it is refused.
    pub(super) fn admit(self, request: Request) -> Option<Self> {
        let is_over = matches!(self, Self::Stopped | Self::Deleting);
        match request {
            Request::Start => (self == Self::Created).then_some(Self::Starting),
            Request::Kill | Request::Update | Request::Resize => (!is_over).then_some(self),
            Request::Exec => {
                let takes = matches!(self, Self::Created | Self::Starting | Self::Running);
                takes.then_some(self)
            }
            Request::StartExec => (self == Self::Running).then_some(self),
            Request::Pause => (self == Self::Running).then_some(Self::Pausing),
            Request::Resume => (self == Self::Paused).then_some(Self::Resuming),
            Request::Delete => {
                matches!(self, Self::Created | Self::Stopped).then_some(Self::Deleting)
            }
        }
    }

    /// The phase after `outcome`. An end is final: what comes late changes nothing.
    pub(super) fn after(self, outcome: Outcome) -> Self {
        match (self, outcome) {
            (Self::Deleting, _) => Self::Deleting,
            (Self::Stopped, _) | (_, Outcome::Ended) => Self::Stopped,
            (Self::Starting, Outcome::Started)
            | (Self::Pausing, Outcome::PauseFailed)
            | (Self::Resuming, Outcome::Resumed) => Self::Running,
            (Self::Pausing, Outcome::Paused) | (Self::Resuming, Outcome::ResumeFailed) => {
                Self::Paused
            }
            (other, _) => other,
        }
    }

    /// As containerd's protocol names it.
    pub(super) fn status(self) -> Status {
        match self {
            Self::Created | Self::Starting => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Pausing => Status::PAUSING,
            Self::Paused | Self::Resuming => Status::PAUSED,
            Self::Stopped | Self::Deleting => Status::STOPPED,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Pausing => "being paused",
            Self::Paused => "paused",
            Self::Resuming => "being resumed",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
        })
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "started",
            Self::Kill => "signalled",
            Self::Exec | Self::StartExec => "given another process",
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Update => "updated",
            Self::Resize => "resized",
            Self::Delete => "deleted",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For each request: the phases that take it, and what they become.
    fn admitted(request: Request) -> Vec<(Phase, Phase)> {
        let taken = |phase: Phase| phase.admit(request).map(|next| (phase, next));
        Phase::ALL.into_iter().filter_map(taken).collect()
    }

    #[test]
    fn each_request_is_taken_in_its_phases_and_no_other() {
        use Phase::{Created, Deleting, Paused, Pausing, Resuming, Running, Starting, Stopped};
        let alive = [Created, Starting, Running, Pausing, Paused, Resuming];
        let unchanged: Vec<_> = alive.into_iter().map(|phase| (phase, phase)).collect();
        assert_eq!(admitted(Request::Start), [(Created, Starting)]);
        assert_eq!(admitted(Request::Kill), unchanged);
        assert_eq!(admitted(Request::Update), unchanged);
        assert_eq!(admitted(Request::Resize), unchanged);
        let takes_execs = [(Created, Created), (Starting, Starting), (Running, Running)];
        assert_eq!(admitted(Request::Exec), takes_execs);
        assert_eq!(admitted(Request::StartExec), [(Running, Running)]);
        assert_eq!(admitted(Request::Pause), [(Running, Pausing)]);
        assert_eq!(admitted(Request::Resume), [(Paused, Resuming)]);
        assert_eq!(admitted(Request::Delete), [(Created, Deleting), (Stopped, Deleting)]);
    }

    #[test]
    fn an_end_is_final_whatever_comes_late() {
        for phase in Phase::ALL {
            let ended = phase.after(Outcome::Ended);
            assert_eq!(ended.status(), Status::STOPPED);
            for late in [Outcome::Started, Outcome::Paused, Outcome::Resumed] {
                assert_eq!(ended.after(late), ended);
            }
        }
    }

    #[test]
    fn what_fails_goes_back() {
        assert_eq!(Phase::Pausing.after(Outcome::PauseFailed), Phase::Running);
        assert_eq!(Phase::Resuming.after(Outcome::ResumeFailed), Phase::Paused);
        assert_eq!(Phase::Starting.after(Outcome::Started), Phase::Running);
        assert_eq!(Phase::Pausing.after(Outcome::Paused), Phase::Paused);
        assert_eq!(Phase::Resuming.after(Outcome::Resumed), Phase::Running);
        assert_eq!(Phase::Running.after(Outcome::Started), Phase::Running);
    }
}
