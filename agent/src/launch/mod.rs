//! Making processes in containers, in a child of the agent that runs libcontainer once and ends.
//!
//! libcontainer clones without exec, changes its working folder, and leaves its own
//! `oom_score_adj` and dumpable flag as the container's: none of this may happen to PID 1 or in a
//! process with threads. So the agent executes itself again, and the child is single-threaded.
//!
//! ```text
//! agent (async)                               child (blocking)
//!   order, descriptors ----- SEQPACKET ----->  libcontainer: create, or join and execve
//!                      <---- answer, terminal  made (it waits), or running, or why not
//!   start --------------------------------->   (create only) lets the init execve
//!                      <- status pipe -------  closed by execve, or its error
//! ```
//! The processes made are children of the agent, which reaps them.

use serde::{Deserialize, Serialize};

use crate::process::Size;

pub(crate) mod child;
pub(crate) mod executor;
pub(crate) mod socket;
pub(crate) mod spawn;

/// Where libcontainer keeps its own state.
pub(crate) const LIBCONTAINER_STATE: &str = "/run/nacre/libcontainer";
/// The folder of a container has its specification and files of its launches.
pub(crate) const BUNDLES: &str = "/run/nacre/bundles";
/// A process's file with this suffix says which capabilities it is to have in the end, if it needs
/// more to install a seccomp filter.
pub(crate) const CAPABILITIES_SUFFIX: &str = ".capabilities";
/// What the executor writes to the status pipe right before it calls execve.
pub(crate) const REACHED_EXECVE: u8 = b'!';

/// What the child is to do. The status pipe's end and three streams (or none) come along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    /// Which container.
    pub(crate) container_id: String,
    /// What to make in it.
    pub(crate) kind: Kind,
    /// Whether a terminal is to be made.
    pub(crate) terminal: bool,
    /// The terminal's size from the first instruction on.
    pub(crate) size: Option<Size>,
}

/// What to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// The container and its init.
    Create,
    /// Another process in it, from this file of its bundle.
    Join {
        /// The file's name.
        process_file: String,
    },
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The process exists: before its execve (create) or after it (join).
    Made {
        /// In the agent's PID namespace.
        pid: i32,
    },
    /// It does not.
    Failed {
        /// libcontainer's words.
        reason: String,
    },
}

/// The word that lets a created init go on to its execve.
pub(crate) const START: &[u8] = b"start";
