//! The file system that outlives its process: virtiofsd's, with names for things that last.
//!
//! It stands between virtiofsd's `Server` and its `PassthroughFs`. The guest sees our node ids and
//! file handles; which of virtiofsd's they are is found anew by each process, when they are first
//! used. What changes names is announced in the queue's record before it is carried out.
//!
//! ```text
//!   Server -- our ids --> Lasting -- its ids --> PassthroughFs --> the share
//!                          |    `-- files without a name (kept)
//!                        table == ledger (outlives the process)
//! ```

mod names;
mod open;
mod recovery;
mod requests;
mod resolve;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use virtiofsd::filesystem::{Context, FileSystem, OpenOptions};

use crate::keep::Keep;
use crate::record::{Intent, Key, Stage};
use crate::table::{Gone, Opened, Session, Table};
use crate::ticket::{self, Past, Ticket};

/// How the layer behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    /// How long attributes stay valid.
    pub(crate) attr_timeout: Duration,
    /// How a file is opened that has no name any more.
    pub(crate) open_options: OpenOptions,
    /// Nothing changes, so nothing has to be recorded.
    pub(crate) read_only: bool,
}

/// The file system below: virtiofsd's, writable or not.
pub(crate) trait Inner: FileSystem<Inode = u64, Handle = u64> + Send + Sync {}

impl<F: FileSystem<Inode = u64, Handle = u64> + Send + Sync> Inner for F {}

/// The file system.
pub(crate) struct Lasting<F>(Arc<Core<F>>);

pub(crate) struct Core<F> {
    inner: F,
    /// Shared by the workers of all queues. Held for moments, never while the host is called.
    table: Mutex<Table>,
    /// Held for reading while a name is looked up, for writing while one changes: what is in the
    /// table is then what is in the share.
    names: RwLock<()>,
    keep: Keep,
    manner: Manner,
}

impl<F> Clone for Lasting<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// An error of this number.
fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// The host's root, for what is done in nobody's name.
fn nobody() -> Context {
    Context { uid: 0.into(), gid: 0.into(), pid: 0 }
}

impl<F: Inner> Lasting<F> {
    /// On what a predecessor left.
    pub(crate) fn new(inner: F, table: Table, keep: Keep, manner: Manner) -> Self {
        let (table, names) = (Mutex::new(table), RwLock::new(()));
        Self(Arc::new(Core { inner, table, names, keep, manner }))
    }

    /// The guest's mount, if a predecessor left one.
    pub(crate) fn session(&self) -> Option<Session> {
        self.0.table().session()
    }

    /// The guest's mount has begun.
    pub(crate) fn mounted(&self, session: &Session) {
        self.0.table().begin(session);
    }

    /// A request is about to be served. Gives the length of its answer if that is written already.
    pub(crate) fn begin(&self, queue: usize, key: Key, is_repeated: bool) -> Option<u32> {
        let past = if is_repeated { self.0.table().record(queue) } else { None };
        let past = match past {
            Some((of, stage)) if of == key => match stage {
                Stage::Done { written_bytes } => return Some(written_bytes),
                Stage::Begun(intent) => Past::Begun(intent),
                Stage::Carried(_) => Past::Carried,
                Stage::Part { changes } => Past::Part(changes),
            },
            _ => Past::Nothing,
        };
        ticket::set(Ticket::new(queue, key, past));
        None
    }

    /// The request's answer of so many bytes is written; or it failed, and is answered otherwise.
    pub(crate) fn finish(&self, written_bytes: Option<u32>) {
        let Some(Ticket { queue, key, past, told, is_recorded, .. }) = ticket::take() else {
            return;
        };
        let Some(written_bytes) = written_bytes else {
            let (gone, closed) = self.0.table().take_back(&told);
            for (_id, handle) in closed {
                self.0.close(handle.node, &handle.opened, handle.is_folder);
            }
            if is_recorded {
                self.0.table().erase_record(queue);
            }
            return self.0.bury(gone);
        };
        if is_recorded || !told.is_nothing() {
            let skipped = if let Past::Part(changes) = past { changes } else { 0 };
            let gone = self.0.table().settle(queue, key, &told, (written_bytes, skipped));
            self.0.bury(gone);
        }
    }
}

impl<F> Core<F> {
    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic is one request's, and the table is whole whenever the lock is free.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names_stay(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn names_change(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a change that must not be made twice.
    fn announce(&self, intent: Intent) {
        let place = ticket::with(|ticket| {
            ticket.is_recorded = true;
            Some((ticket.queue, ticket.key))
        });
        if let Some((queue, key)) = place {
            self.table().write_record(queue, key, &Stage::Begun(intent));
        }
    }

    /// The announced change was not made.
    fn abandon(&self) {
        let place =
            ticket::with(|ticket| std::mem::take(&mut ticket.is_recorded).then_some(ticket.queue));
        if let Some(queue) = place {
            self.table().erase_record(queue);
        }
    }
}

impl<F: Inner> Core<F> {
    /// Gives back what belonged to nodes that are no more.
    fn bury(&self, gone: Vec<Gone>) {
        for node in gone {
            if let Some(inner) = node.inner {
                self.inner.forget(nobody(), inner, 1);
            }
            if node.is_kept {
                self.keep.remove(node.id);
            }
        }
    }

    /// Closes a node's file, if it is the file server's.
    fn close(&self, node: u64, opened: &Opened, is_folder: bool) {
        if let Ok(inner) = self.inner_of(node) {
            self.close_inner(inner, Some(opened), is_folder);
        }
    }

    fn close_inner(&self, inner: u64, opened: Option<&Opened>, is_folder: bool) {
        let Some(Opened::Inner(handle)) = opened else { return };
        let closed = if is_folder {
            self.inner.releasedir(nobody(), inner, 0, *handle)
        } else {
            self.inner.release(nobody(), inner, 0, *handle, false, false, None)
        };
        if let Err(error) = closed {
            log::debug!("cannot close a file: {error}");
        }
    }
}
