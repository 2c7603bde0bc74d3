//! What a process begins with: a predecessor's, if its supervisor kept it, or new and empty.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use backend_daemon::process::Estate;

use crate::conduit::Conduit;
use crate::keep::{Keep, Key};
use crate::ledger::{Ledger, LedgerError};
use crate::packet::Cid;

/// All that outlives a process, taken over.
#[derive(Debug)]
pub struct Heritage {
    /// What is known of the connections.
    pub ledger: Ledger,
    /// Where descriptors are left.
    pub keep: Keep,
    /// The pipe to the sockets.
    pub conduit: Conduit,
    /// The connections' sockets, by key; and what nobody knows.
    pub held: BTreeMap<u64, OwnedFd>,
    /// Where host programs connect, if there was a predecessor.
    pub listener: Option<OwnedFd>,
}

/// Why a process can't begin.
#[derive(Debug, thiserror::Error)]
pub enum HeritageError {
    /// There is no ledger.
    #[error("cannot take up the connections")]
    Ledger(#[from] LedgerError),
    /// There is no pipe, or nobody to keep it.
    #[error("cannot make the pipe to the host programs")]
    Conduit(#[source] io::Error),
    /// There is nobody to keep the listening socket.
    #[error("cannot leave the listening socket with the supervisor")]
    Listener(#[source] io::Error),
}

impl Heritage {
    /// Takes over what the supervisor kept for the guest with this context id, if anything.
    ///
    /// # Errors
    ///
    /// Fails if it can't be read, or the host refuses what is missing.
    pub fn take(estate: Option<Estate>, cid: Cid) -> Result<Self, HeritageError> {
        let (ledger, store, mut held) = match estate {
            Some(Estate { state, store, held }) => {
                (Ledger::open(state, cid)?, Some(store), held.into_iter().collect())
            }
            None => (Ledger::alone(cid)?, None, BTreeMap::new()),
        };
        let mut keep = Keep::new(store);
        let listener = held.remove(&Key::Listener.encode());
        let ends = (held.remove(&Key::PipeRead.encode()), held.remove(&Key::PipeWrite.encode()));
        let conduit = match ends {
            (Some(read), Some(write)) => Conduit::adopt(read, write),
            (None | Some(_), None | Some(_)) => {
                let conduit = Conduit::make().map_err(HeritageError::Conduit)?;
                let (read, write) = conduit.ends();
                keep.put(Key::PipeRead, read)
                    .and_then(|()| keep.put(Key::PipeWrite, write))
                    .map_err(HeritageError::Conduit)?;
                conduit
            }
        };
        Ok(Self { ledger, keep, conduit, held, listener })
    }

    /// Has the listening socket kept.
    ///
    /// # Errors
    ///
    /// Fails if nobody takes it.
    pub fn keep_listener(&mut self, listener: BorrowedFd<'_>) -> Result<(), HeritageError> {
        self.keep.put(Key::Listener, listener).map_err(HeritageError::Listener)
    }
}
