//! A process that containerd knows: its state, what it waits for, and its end.

use std::time::SystemTime;

use tokio::sync::watch;

use super::{
    guest::NewProcess,
    phase::{Outcome, Phase},
    stdio::{Attachment, Names},
};

/// 128 and SIGKILL.
const KILLED: u32 = 137;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) code: u32,
    pub(super) at: SystemTime,
}

impl End {
    /// By force, now.
    pub(super) fn killed() -> Self {
        Self::now(KILLED)
    }

    pub(super) fn now(code: u32) -> Self {
        Self { code, at: SystemTime::now() }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) phase: watch::Sender<Phase>,
    /// Set once, when the end has been told.
    pub(super) end: watch::Sender<Option<End>>,
    /// True when all its output is written, or given up.
    pub(super) drained: watch::Sender<bool>,
    pub(super) names: Names,
    /// What its terminal should have, if it was said before the start.
    pub(super) size: Option<(u16, u16)>,
    pub(super) attachment: Option<Attachment>,
    /// Whether its input is to end with its writers, said before there was an attachment.
    pub(super) input_is_closed: bool,
    /// What the guest is told when it starts; none for an init.
    pub(super) new: Option<NewProcess>,
    /// A host process; 0 before the start of an added process.
    pub(super) pid: u32,
}

impl Process {
    /// One that has not been started.
    pub(super) fn new(names: Names, new: Option<NewProcess>, pid: u32) -> Self {
        Self {
            phase: watch::Sender::new(Phase::Created),
            end: watch::Sender::new(None),
            drained: watch::Sender::new(false),
            names,
            size: None,
            attachment: None,
            input_is_closed: false,
            new,
            pid,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Notes what came of a request, and answers the phase then.
    pub(super) fn note(&self, outcome: Outcome) -> Phase {
        let phase = self.phase().after(outcome);
        self.set_phase(phase);
        phase
    }

    pub(super) fn ended(&self) -> Option<End> {
        *self.end.borrow()
    }
}
