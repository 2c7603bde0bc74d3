//! From the guest's ids to files: found where they were, once for each process.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::OFlags;
use virtiofsd::filesystem::Entry;

use super::{Core, Inner, errno, nobody};
use crate::keep::Keep;
use crate::layout::NAME_BYTES;
use crate::record::Spot;
use crate::table::{Handle, Opened, Place, ROOT};

/// What is at a name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Its inode number.
    pub(super) inode: u64,
    /// Its node, if the guest knows it.
    pub(super) node: Option<u64>,
}

/// An open file, as it can be worked with.
pub(super) enum At {
    /// The file server's inode and handle.
    Inner(u64, u64),
    Kept(Arc<File>),
}

/// A name that a file may have: of one part that leads nowhere else.
pub(super) fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" => Err(errno(libc::ENOENT)),
        b"." | b".." => Err(errno(libc::EINVAL)),
        name if name.contains(&b'/') => Err(errno(libc::EINVAL)),
        name if name.len() > NAME_BYTES => Err(errno(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

impl<F: Inner> Core<F> {
    /// What a node is to this process.
    pub(super) fn place(&self, id: u64) -> io::Result<Place> {
        match self.known_place(id)? {
            Place::Unknown => {
                let _names = self.names_stay();
                self.locate(id)
            }
            place => Ok(place),
        }
    }

    fn known_place(&self, id: u64) -> io::Result<Place> {
        let table = self.table();
        let node = table.node(id).ok_or_else(|| errno(libc::EBADF))?;
        Ok(node.place.clone())
    }

    /// The file server's inode of a node; fails for a file that has no name any more.
    pub(super) fn inner_of(&self, id: u64) -> io::Result<u64> {
        match self.place(id)? {
            Place::Inner(inner) => Ok(inner),
            Place::Unknown | Place::Kept(_) => Err(errno(libc::ESTALE)),
        }
    }

    /// The file server's inode of a folder, while names are held.
    pub(super) fn folder(&self, id: u64) -> io::Result<u64> {
        match self.locate(id)? {
            Place::Inner(inner) => Ok(inner),
            Place::Unknown | Place::Kept(_) => Err(errno(libc::ENOENT)),
        }
    }

    /// Finds a node where it was, and its folders before it. Names have to be held.
    pub(super) fn locate(&self, id: u64) -> io::Result<Place> {
        let stale = || errno(libc::ESTALE);
        let (mut place, mut way) = (self.known_place(id)?, Vec::new());
        let mut next = id;
        while matches!(place, Place::Unknown) {
            let table = self.table();
            let node = table.node(next).ok_or_else(stale)?;
            let name = table.name(next).ok_or_else(stale)?;
            way.push((next, name, node.inode, node.kind));
            next = node.parent;
            place = table.node(next).ok_or_else(stale)?.place.clone();
            if way.iter().any(|(id, ..)| *id == next) {
                return Err(stale());
            }
        }
        for (id, name, inode, kind) in way.into_iter().rev() {
            let Place::Inner(folder) = place else { return Err(stale()) };
            let entry = self.inner.lookup(nobody(), folder, &name);
            let entry = entry.map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => stale(),
                _ => error,
            })?;
            let is_it = entry.attr.ino == inode && entry.attr.mode & libc::S_IFMT == kind;
            if !is_it || !self.table().learn(id, entry.inode) {
                self.inner.forget(nobody(), entry.inode, 1);
            }
            place = self.known_place(id)?;
            if !is_it && matches!(place, Place::Unknown) {
                return Err(stale());
            }
        }
        Ok(place)
    }

    /// Looks at a name; the file server's `folder` is the one that it is in. Names have to be held.
    pub(super) fn see(&self, folder: u64, name: &CStr) -> io::Result<Option<Seen>> {
        let entry = match self.inner.lookup(nobody(), folder, name) {
            Ok(entry) => entry,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        let inode = entry.attr.ino;
        let mut node = self.table().by_inner(entry.inode).map(|node| node.id);
        if node.is_none() {
            self.locate_all(inode);
            node = self.table().by_inner(entry.inode).map(|node| node.id);
        }
        self.inner.forget(nobody(), entry.inode, 1);
        Ok(Some(Seen { inode, node }))
    }

    /// Finds all nodes with this inode number. The file server knows a file by one inode, whatever
    /// its names: after this it is known whether the guest knows the file.
    fn locate_all(&self, inode: u64) {
        let unknown = self.table().unknown(inode);
        for id in unknown {
            if let Err(error) = self.locate(id) {
                log::debug!("a file is not where it was: {error}");
            }
        }
    }

    /// The guest's id of what the file server found at `spot`, pinned. Takes the file server's
    /// reference over. Names have to be held.
    pub(super) fn identify(&self, spot: &Spot, entry: &Entry, is_made: bool) -> io::Result<u64> {
        if let Some(id) = self.pin_known(spot, entry.inode) {
            return Ok(id);
        }
        let facts = (entry.attr.ino, entry.attr.mode);
        if !self.table().unknown(facts.0).is_empty() {
            self.locate_all(facts.0);
            self.recognise(spot, entry);
        }
        if let Some(id) = self.pin_known(spot, entry.inode) {
            return Ok(id);
        }
        // Another queue may have been quicker to add it.
        let mut table = self.table();
        let known = table.by_inner(entry.inode).map(|node| node.id);
        let added = match known {
            Some(id) => {
                table.pin(id);
                Ok(id)
            }
            None => table.add(spot, facts, entry.inode, is_made),
        };
        drop(table);
        if known.is_some() || added.is_err() {
            self.inner.forget(nobody(), entry.inode, 1);
        }
        added.map_err(|_full| errno(libc::ENFILE))
    }

    fn pin_known(&self, spot: &Spot, inner: u64) -> Option<u64> {
        let mut table = self.table();
        let node = table.by_inner(inner)?;
        let (id, is_kept) = (node.id, node.is_kept);
        let is_nameless = !node.is_named() && id != ROOT;
        table.pin(id);
        if is_nameless {
            // It has another name, by which it can be found from now on.
            table.rename(&[(id, Some(spot.clone()))], Vec::new());
            table.set_kept(id, false);
        }
        drop(table);
        if is_nameless && is_kept {
            self.keep.remove(id);
        }
        self.inner.forget(nobody(), inner, 1);
        Some(id)
    }

    /// A file that lost the name by which the guest knew it may have another one: this.
    fn recognise(&self, spot: &Spot, entry: &Entry) {
        let unknown = self.table().unknown(entry.attr.ino);
        for id in unknown {
            let Ok(Place::Kept(file)) = self.known_place(id) else { continue };
            let found = self.path(spot).and_then(|path| self.keep.find(&path));
            if !found.is_ok_and(|found| Keep::is_same(&found, &file)) {
                continue;
            }
            let Ok(folder) = self.folder(spot.parent) else { continue };
            let Ok(again) = self.inner.lookup(nobody(), folder, &spot.name) else { continue };
            if again.inode != entry.inode || !self.table().learn(id, again.inode) {
                self.inner.forget(nobody(), again.inode, 1);
            }
        }
    }

    /// The names from the share's folder to `spot`.
    pub(super) fn path(&self, spot: &Spot) -> io::Result<Vec<CString>> {
        let table = self.table();
        let (mut names, mut next) = (vec![spot.name.clone()], spot.parent);
        while next != ROOT {
            let node = table.node(next).ok_or_else(|| errno(libc::ESTALE))?;
            names.push(table.name(next).ok_or_else(|| errno(libc::ESTALE))?);
            next = node.parent;
        }
        names.reverse();
        Ok(names)
    }

    /// An open file of the guest's.
    pub(super) fn opened(&self, node: u64, id: u64) -> io::Result<At> {
        let handle = self.table().handle(id, node).cloned();
        let handle = handle.ok_or_else(|| errno(libc::EBADF))?;
        let opened = match handle.opened {
            Opened::NotYet => self.open_again(&handle)?,
            ref opened => opened.clone(),
        };
        match opened {
            Opened::Inner(opened) => Ok(At::Inner(self.inner_of(node)?, opened)),
            Opened::Kept(file) => Ok(At::Kept(file)),
            Opened::NotYet => Err(errno(libc::EBADF)),
        }
    }

    /// Opens what a predecessor had open.
    fn open_again(&self, handle: &Handle) -> io::Result<Opened> {
        let once = OFlags::TRUNC | OFlags::CREATE | OFlags::EXCL;
        let flags = handle.flags & !once.bits();
        let opened = match self.place(handle.node)? {
            Place::Inner(inner) if handle.is_folder => {
                self.inner.opendir(nobody(), inner, flags)?.0.map(Opened::Inner)
            }
            Place::Inner(inner) => {
                self.inner.open(nobody(), inner, false, flags)?.0.map(Opened::Inner)
            }
            Place::Kept(file) => {
                let flags = OFlags::from_bits_retain(flags);
                Some(Opened::Kept(Arc::new(self.keep.reopen(&file, flags)?)))
            }
            Place::Unknown => None,
        };
        let opened = opened.ok_or_else(|| errno(libc::ESTALE))?;
        if !self.table().reopen(handle.id, opened.clone()) {
            self.close(handle.node, &opened, handle.is_folder);
        }
        let now = self.table().handle(handle.id, handle.node).map(|handle| handle.opened.clone());
        now.ok_or_else(|| errno(libc::EBADF))
    }
}
