//! What a process has from its predecessor, or begins with.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use backend_daemon::process::{DaemonArgs, EstateError, State, Store};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::layout::STATE_BYTES;
use crate::ledger::Ledger;
pub use crate::ledger::LedgerError;
use crate::table::Table;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InheritanceError {
    /// The supervisor does not hand it in.
    #[error(transparent)]
    Estate(#[from] EstateError),
    /// It can't be read.
    #[error(transparent)]
    State(#[from] LedgerError),
    /// There is no supervisor, and no memory either.
    #[error("no memory for the guest's files")]
    Memory(#[source] io::Error),
}

/// What outlives the process, as it was found.
pub struct Inheritance {
    pub(crate) table: Table,
    pub(crate) store: Option<Store>,
    /// Files without a name, by their nodes.
    pub(crate) held: Vec<(u64, OwnedFd)>,
}

impl Inheritance {
    /// Takes it up. Without a supervisor it begins anew, and ends with the process.
    ///
    /// # Errors
    ///
    /// Fails if the state is none that this program can read; it is left as it is then.
    pub fn take(args: &DaemonArgs) -> Result<Self, InheritanceError> {
        let (state, store, held) = match args.estate()? {
            Some(estate) => (estate.state, Some(estate.store), estate.held),
            None => (own_state()?, None, Vec::new()),
        };
        let table = Table::load(Ledger::open(state)?)?;
        Ok(Self { table, store, held })
    }
}

fn own_state() -> Result<State, InheritanceError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = |error: rustix::io::Errno| InheritanceError::Memory(error.into());
    let file = File::from(memfd_create("nacre-fs", flags).map_err(memory)?);
    file.set_len(STATE_BYTES as u64).map_err(InheritanceError::Memory)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(memory)?;
    Ok(State::map(file)?)
}
