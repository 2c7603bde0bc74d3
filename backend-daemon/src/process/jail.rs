//! The first jail: no new privileges, no capabilities, no core dump, and a filter per thread.
//!
//! [`close_process`] runs before any thread is started, so that all of them inherit it; then
//! each thread puts its own filter on with [`Jail::close_thread`].

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_no_new_privs;
use seccompiler::{BackendError, BpfProgram};

use super::Policy;
use super::seccomp::{Kind, Removal, filter};
use crate::sys;

/// Why the jail can't be closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum JailError {
    #[error("cannot give up {what}")]
    Process { what: &'static str, source: io::Error },
    #[error("cannot give up capabilities")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error("cannot make a system call filter")]
    Filter(#[from] BackendError),
    #[error("cannot put a system call filter on a thread")]
    Apply(#[from] seccompiler::Error),
}

/// The filters, made while memory and time are plenty.
pub(super) struct Jail {
    main: BpfProgram,
    protocol: BpfProgram,
    worker: BpfProgram,
}

/// Which of the jail's filters a thread puts on.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cell {
    Main,
    Protocol,
    Worker,
}

impl Jail {
    /// `removal` says what the main thread removes when all is over.
    pub(super) fn new(policy: &Policy, removal: Removal) -> Result<Self, JailError> {
        Ok(Self {
            main: filter(Kind::Main(removal))?,
            protocol: filter(Kind::Protocol)?,
            worker: filter(Kind::Worker(policy))?,
        })
    }

    /// Puts the filter of `cell` on the calling thread, for good.
    pub(super) fn close_thread(&self, cell: Cell) -> Result<(), JailError> {
        let program = match cell {
            Cell::Main => &self.main,
            Cell::Protocol => &self.protocol,
            Cell::Worker => &self.worker,
        };
        Ok(seccompiler::apply_filter(program)?)
    }
}

/// Gives up what the whole process never needs again. It binds the calling thread and the threads
/// that it starts later, so it has to come before them.
pub(super) fn close_process(keep: &[Capability]) -> Result<(), JailError> {
    sys::one_arena();
    set_no_new_privs(true)
        .map_err(|error| JailError::Process { what: "new privileges", source: error.into() })?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| JailError::Process { what: "core dumps", source: error.into() })?;
    drop_capabilities(keep)
}

fn drop_capabilities(keep: &[Capability]) -> Result<(), JailError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    // The bounding set matters to programs that are executed, of which there are none; a process
    // that has not the right to shrink it has nothing to lose from it either.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let kept: CapsHashSet = permitted.into_iter().filter(|held| keep.contains(held)).collect();
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(())
}
