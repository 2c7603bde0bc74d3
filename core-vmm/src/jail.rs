//! The first jail: no privileges to gain, no capabilities, not to be traced or dumped by others.
//!
//! It is entered when everything is open and connected and before any thread is started, as
//! capabilities belong to each thread. System calls are filtered after that: `seccomp`.

use std::io;

use caps::{CapSet, errors::CapsError};
use rustix::{
    io::Errno,
    process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit},
    thread::set_no_new_privs,
};

use crate::seccomp::{self, SeccompError};

/// Why the process would not be jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A process attribute could not be set.
    #[error("can't {action}")]
    Attribute {
        /// What failed.
        action: &'static str,
        /// Why.
        source: Errno,
    },
    /// Capabilities are still there.
    #[error("can't drop the {set:?} capabilities")]
    Capabilities {
        /// Which.
        set: CapSet,
        /// Why.
        source: CapsError,
    },
}

/// Gives up all that the process and this thread could do beyond an ordinary user's process.
///
/// # Errors
///
/// Fails if any of it can't be given up.
pub fn enter() -> Result<(), JailError> {
    let failed = |action| move |source| JailError::Attribute { action, source };
    set_no_new_privs(true).map_err(failed("give up gaining privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("become undumpable"))?;
    // Dropping from the bounding set takes a capability. A process without it has none that the
    // set could bound, as it can gain none either.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false) {
        clear(CapSet::Bounding)?;
    }
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        clear(set)?;
    }
    Ok(())
}

/// Lets the process have as many descriptors as it may: a vCPU takes two, and the usual soft limit is
/// for programs that use `select`.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn allow_descriptors() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

/// What the watchdog's thread does first: it is started before the process is jailed.
///
/// # Errors
///
/// Fails if its filter is malformed.
pub fn watchdog() -> Result<impl FnOnce() -> io::Result<()> + Send + 'static, SeccompError> {
    let filter = seccomp::watchdog_filter()?;
    Ok(move || {
        enter().map_err(io::Error::other)?;
        seccompiler::apply_filter(&filter).map_err(io::Error::other)
    })
}

fn clear(set: CapSet) -> Result<(), JailError> {
    caps::clear(None, set).map_err(|source| JailError::Capabilities { set, source })
}
