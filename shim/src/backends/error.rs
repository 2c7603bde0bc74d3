//! Why there is no backend.

use std::io;

use crate::{
    backends::patience::Enough,
    child::{ChildError, End},
    vmm::VmmError,
};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// It can't be started.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// What it is to be started with can't be made.
    #[error("{name}: no socket, pipe or memory for it")]
    Prepare {
        /// Which.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// It ended.
    #[error("{name} {end}{}", said(last_words))]
    Ended {
        /// Which.
        name: String,
        /// How.
        end: End,
        /// The last line that it printed.
        last_words: Option<String>,
    },
    /// It runs and does not become ready.
    #[error("{0} does not become ready")]
    NotReady(String),
    /// The VMM has cut it off.
    #[error("{name} was cut off by nacre-vmm ({reason})")]
    CutOff {
        /// Which.
        name: String,
        /// The VMM's reason.
        reason: String,
    },
    /// It misused the place where it may leave descriptors.
    #[error("{name} broke the rules of its store: {fault}")]
    Store {
        /// Which.
        name: String,
        /// What it did.
        fault: StoreFault,
    },
    /// The VMM does not take it.
    #[error("{name} was not taken by nacre-vmm")]
    NotTaken {
        /// Which.
        name: String,
        /// What the VMM says.
        source: VmmError,
    },
    /// It ended or was ended, again and again.
    #[error("{name} is given up after {enough}")]
    GivenUp {
        /// Which.
        name: String,
        /// How often.
        enough: Enough,
        /// The last one.
        source: Box<Self>,
    },
}

/// What a backend must not do with its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreFault {
    /// A datagram that is no message, or with the wrong descriptors beside it.
    #[error("what it says is no message")]
    Malformed,
    /// More descriptors than are kept.
    #[error("it leaves too many descriptors")]
    TooMany,
}

impl BackendError {
    /// The death of the process at the bottom of it, if that is what it is.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        match self {
            Self::Ended { end, .. } => Some(*end),
            Self::GivenUp { source, .. } => source.end(),
            _ => None,
        }
    }
}

pub(crate) fn said(last_words: &Option<String>) -> String {
    last_words.as_ref().map(|words| format!("; its last words: {words}")).unwrap_or_default()
}
