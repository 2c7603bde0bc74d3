//! Files and folders that the guest opens, reads and closes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::OFlags;
use virtiofsd::filesystem::{Context, DirEntry, DirectoryIterator, OpenOptions};
use virtiofsd::fuse::Attr;

use super::{Core, Inner, errno};
use crate::kept;
use crate::table::{Opened, Place};
use crate::ticket;

/// How many entries of a folder one answer has at most: all that it tells of is settled at once.
const MOST_ENTRIES: usize = 256;

/// A part of a folder's entries.
pub(crate) struct Entries<I> {
    all: I,
    left: usize,
}

impl<I> Entries<I> {
    pub(super) fn new(all: I) -> Self {
        Self { all, left: MOST_ENTRIES }
    }
}

impl<I: DirectoryIterator> DirectoryIterator for Entries<I> {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        self.left = self.left.checked_sub(1)?;
        self.all.next()
    }
}

impl<F: Inner> Core<F> {
    /// Opens a node for the guest.
    pub(super) fn open_node(
        &self,
        context: Context,
        (node, is_folder): (u64, bool),
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (opened, options) = match self.place(node)? {
            Place::Inner(inner) => {
                let (handle, options) = if is_folder {
                    self.inner.opendir(context, inner, flags)?
                } else {
                    self.inner.open(context, inner, kill_priv, flags)?
                };
                let Some(handle) = handle else { return Ok((None, options)) };
                (Opened::Inner(handle), options)
            }
            Place::Kept(_) if is_folder => return Err(errno(libc::ENOENT)),
            Place::Kept(file) => {
                let file = self.keep.reopen(&file, OFlags::from_bits_retain(flags))?;
                (Opened::Kept(Arc::new(file)), self.manner.open_options)
            }
            Place::Unknown => return Err(errno(libc::ESTALE)),
        };
        let id = self.tell_open(node, (flags, is_folder), &opened)?;
        Ok((Some(id), options))
    }

    /// Gives the guest a handle for what was opened for it.
    pub(super) fn tell_open(
        &self,
        node: u64,
        (flags, is_folder): (u32, bool),
        opened: &Opened,
    ) -> io::Result<u64> {
        let id = self.table().open(node, flags, is_folder, opened.clone());
        let id = id.map_err(|_full| {
            self.close(node, opened, is_folder);
            errno(libc::ENFILE)
        })?;
        ticket::opened(id);
        Ok(id)
    }

    /// Closes an open file of the guest's; `act` does so with the file server's inode and handle.
    pub(super) fn close_handle(
        &self,
        node: u64,
        id: u64,
        act: impl FnOnce(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let handle = self.table().handle(id, node).cloned();
        let handle = handle.ok_or_else(|| errno(libc::EBADF))?;
        ticket::with(|ticket| ticket.told.closed.push(id));
        match handle.opened {
            Opened::Inner(opened) => act(self.inner_of(node)?, opened),
            Opened::NotYet | Opened::Kept(_) => Ok(()),
        }
    }

    /// The attributes of a file without a name.
    pub(super) fn attributes(&self, node: u64, file: &OwnedFd) -> io::Result<(Attr, Duration)> {
        log::trace!("node {node} has no name any more");
        Ok((kept::attributes(file)?, self.manner.attr_timeout))
    }
}
