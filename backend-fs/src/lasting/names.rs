//! Requests that change names, and what else must not be done twice.
//!
//! Each one looks at what there is, announces what it is about to change, and then has the file
//! server change it. A successor that is given the request again compares what there is with what
//! was announced (`recovery`), and either does it for the first time or only answers.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::{Context, Entry, Extensions, OpenOptions};

use super::resolve::check_name;
use super::{Core, Inner, errno, nobody};
use crate::kept;
use crate::record::{Intent, Move, Spot};
use crate::table::{Opened, Place};
use crate::ticket;

/// A file that was just made, as the guest knows it.
pub(super) type Created = (Entry, Option<u64>, OpenOptions);

/// How a file is to be made and opened.
pub(super) struct Creation {
    pub(super) mode: u32,
    pub(super) kill_priv: bool,
    pub(super) flags: u32,
    pub(super) umask: u32,
    pub(super) extensions: Extensions,
}

impl Move {
    /// Where nodes are once it is carried out.
    pub(super) fn outcome(&self) -> Vec<(u64, Option<Spot>)> {
        let moved = self.node.map(|node| (node, Some(self.to.clone())));
        let left = self.exchanges.then(|| self.from.clone());
        let target = self.target.and_then(|(_inode, node)| node);
        moved.into_iter().chain(target.map(|node| (node, left))).collect()
    }
}

impl<F: Inner> Core<F> {
    /// Takes a name: for the inode of this number, or a new one, which `act` makes in a folder of
    /// the file server's.
    pub(super) fn make(
        &self,
        spot: &Spot,
        inode: Option<u64>,
        act: impl FnOnce(u64) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let _names = self.names_change();
        let folder = self.before_make(spot, inode)?;
        let entry = if ticket::is_carried() {
            self.inner.lookup(nobody(), folder, &spot.name)?
        } else {
            act(folder).inspect_err(|_error| self.abandon())?
        };
        let id = self.identify(spot, &entry, true)?;
        ticket::found(id);
        if inode.is_some() && !self.table().is_at(id, spot.parent, &spot.name) {
            // Of two names the new one is more likely to stay.
            let left = self.table().rename(&[(id, Some(spot.clone()))], Vec::new());
            self.bury(left);
        }
        Ok(Entry { inode: id, ..entry })
    }

    /// Gives the file server's folder.
    fn before_make(&self, spot: &Spot, inode: Option<u64>) -> io::Result<u64> {
        check_name(&spot.name)?;
        let folder = self.folder(spot.parent)?;
        if ticket::is_carried() || self.manner.read_only {
            return Ok(folder);
        }
        if !self.table().has_room() {
            return Err(errno(libc::ENFILE));
        }
        if self.see(folder, &spot.name)?.is_none() {
            self.announce(Intent::Make { spot: spot.clone(), inode });
        }
        Ok(folder)
    }

    /// Makes a file and opens it.
    pub(super) fn make_open(
        &self,
        context: Context,
        spot: &Spot,
        how: Creation,
    ) -> io::Result<Created> {
        let _names = self.names_change();
        let folder = self.before_make(spot, None)?;
        let flags = how.flags;
        let (entry, handle, options) = if ticket::is_carried() {
            self.find_made(context, (folder, &spot.name), &how)?
        } else {
            let Creation { mode, kill_priv, flags, umask, extensions } = how;
            let name = &spot.name;
            self.inner
                .create(context, folder, name, mode, kill_priv, flags, umask, extensions)
                .inspect_err(|_error| self.abandon())?
        };
        let opened = handle.map(Opened::Inner);
        let known = self.identify(spot, &entry, true).inspect_err(|_error| {
            // Without a node there is nobody to close it for.
            self.close_inner(entry.inode, opened.as_ref(), false);
        })?;
        let handle = opened.map(|opened| self.tell_open(known, (flags, false), &opened));
        match handle.transpose() {
            Ok(handle) => {
                ticket::found(known);
                Ok((Entry { inode: known, ..entry }, handle, options))
            }
            Err(error) => {
                let gone = self.table().unpin(known);
                self.bury(gone);
                Err(error)
            }
        }
    }

    /// Opens the file that a predecessor made.
    fn find_made(
        &self,
        context: Context,
        (folder, name): (u64, &CStr),
        how: &Creation,
    ) -> io::Result<Created> {
        let once = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;
        let flags = how.flags & !once.unsigned_abs();
        let entry = self.inner.lookup(context, folder, name)?;
        let opened = self.inner.open(context, entry.inode, how.kill_priv, flags);
        let opened = opened.inspect_err(|_error| self.inner.forget(context, entry.inode, 1));
        let (handle, options) = opened?;
        Ok((entry, handle, options))
    }

    /// Removes a name from a folder of the file server's.
    pub(super) fn remove(
        &self,
        spot: &Spot,
        act: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        check_name(&spot.name)?;
        let _names = self.names_change();
        let folder = self.folder(spot.parent)?;
        if ticket::is_carried() {
            return Ok(());
        }
        if self.manner.read_only {
            return act(folder);
        }
        let Some(seen) = self.see(folder, &spot.name)? else { return act(folder) };
        let node = self.at(seen.node, spot);
        self.announce(Intent::Remove { spot: spot.clone(), inode: seen.inode, node });
        let was_left = node.is_some_and(|node| self.leave(node, spot));
        self.change(node.filter(|_node| was_left), || act(folder))?;
        if let Some(node) = node {
            let left = self.table().rename(&[(node, None)], Vec::new());
            self.bury(left);
        }
        Ok(())
    }

    /// Gives a file another name, or exchanges two.
    pub(super) fn change_name(
        &self,
        from: Spot,
        to: Spot,
        exchanges: bool,
        act: impl FnOnce(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        check_name(&from.name)?;
        check_name(&to.name)?;
        let _names = self.names_change();
        let (old_folder, new_folder) = (self.folder(from.parent)?, self.folder(to.parent)?);
        if ticket::is_carried() {
            return Ok(());
        }
        if self.manner.read_only {
            return act(old_folder, new_folder);
        }
        let seen = self.see(old_folder, &from.name)?;
        let target = self.see(new_folder, &to.name)?;
        let inode = seen.as_ref().map(|seen| seen.inode);
        let Some(seen) = seen.filter(|_seen| target.map(|target| target.inode) != inode) else {
            // There is nothing to move, or both names are one file's and both stay.
            return act(old_folder, new_folder);
        };
        let node = self.at(seen.node, &from);
        let target = target.map(|target| (target.inode, self.at(target.node, &to)));
        let lost = target.and_then(|(_inode, node)| node).filter(|_node| !exchanges);
        let was_left = lost.is_some_and(|node| self.leave(node, &to));
        let change = Move { from, to, inode: seen.inode, node, target, exchanges };
        self.announce(Intent::Move(change.clone()));
        self.change(lost.filter(|_node| was_left), || act(old_folder, new_folder))?;
        let left = self.table().rename(&change.outcome(), Vec::new());
        self.bury(left);
        Ok(())
    }

    /// A node, if `spot` is the name that the guest knows it by.
    fn at(&self, node: Option<u64>, spot: &Spot) -> Option<u64> {
        node.filter(|node| self.table().is_at(*node, spot.parent, &spot.name))
    }

    /// Carries out what was announced. If it fails, `left` is not left to the successor after all.
    fn change(&self, left: Option<u64>, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        act().inspect_err(|_error| {
            self.abandon();
            if let Some(node) = left {
                self.table().set_kept(node, false);
                self.keep.remove(node);
            }
        })
    }

    /// Leaves a file to the successor that is about to lose its name. Gives whether that is new.
    fn leave(&self, node: u64, spot: &Spot) -> bool {
        if !self.keep.has_store() || self.table().node(node).is_none_or(|node| node.is_kept) {
            return false;
        }
        let found = self.path(spot).and_then(|path| self.keep.find(&path));
        match found {
            Ok(file) => {
                let is_kept = self.keep.put(node, &file);
                self.table().set_kept(node, is_kept);
                is_kept
            }
            Err(error) => {
                log::debug!("a file to be removed can't be kept: {error}");
                false
            }
        }
    }

    /// Where to write a request's data that go to a file's end: nowhere in particular, or to the
    /// very place to which a predecessor may have written them.
    pub(super) fn place_to_append(&self, node: u64, len_bytes: u64) -> io::Result<Option<u64>> {
        if self.manner.read_only {
            return Ok(None);
        }
        let size_bytes = match self.place(node)? {
            Place::Inner(inner) => self.inner.getattr(nobody(), inner, None)?.0.size,
            Place::Kept(file) => kept::attributes(&file)?.size,
            Place::Unknown => return Err(errno(libc::ESTALE)),
        };
        if let Some(Intent::Append { size_bytes: before }) = ticket::begun()
            && (before..=before + len_bytes).contains(&size_bytes)
        {
            return Ok(Some(before));
        }
        self.announce(Intent::Append { size_bytes });
        Ok(None)
    }

    /// Announces that an extended attribute is about to be set or removed. Gives whether it was
    /// there before this request was first served.
    pub(super) fn before_attribute(&self, context: Context, inner: u64, name: &CStr) -> bool {
        if let Some(Intent::Attribute { existed }) = ticket::begun() {
            return existed;
        }
        let existed = self.inner.getxattr(context, inner, name, 0).is_ok();
        self.announce(Intent::Attribute { existed });
        existed
    }
}
