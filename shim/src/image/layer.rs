//! Applies one layer of an image to a folder.
//!
//! A layer is read twice: first its whiteouts, which by the OCI image specification (layer.md,
//! "Whiteouts") concern only what the layers below left, then its entries. The archive is
//! untrusted: all names are resolved inside the folder, and its size is bounded.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    fchown, fsetxattr, futimens, linkat, mkdirat, mknodat, openat, symlinkat,
};
use tar::{Archive, Entry, EntryType};

use crate::image::beneath::{self, Beneath, Place};

/// The most that one image may unpack to, in bytes.
pub const MAX_BYTES: u64 = 64 << 30;
/// The most entries of one layer.
const MAX_ENTRIES: usize = 2_000_000;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const XATTR: &str = "SCHILY.xattr.";

/// What one reading of a layer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Take away what the layer hides.
    Whiteouts,
    /// Add what it brings.
    Entries,
}

/// Where layers are applied.
#[derive(Debug)]
pub struct Target {
    root: Beneath,
    // Ownership and extended attributes are kept only by root, who may set them.
    privileged: bool,
    left_bytes: u64,
}

/// An entry that can't be applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The archive can't be read.
    #[error("the archive is damaged")]
    Archive(#[source] io::Error),
    /// One of its entries can't be made.
    #[error("entry `{path}`")]
    Entry {
        /// Its name.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// It is larger than anything sensible.
    #[error("it unpacks to more than {MAX_BYTES} bytes or {MAX_ENTRIES} entries")]
    TooLarge,
}

impl Target {
    /// The folder at `root`.
    ///
    /// # Errors
    ///
    /// Fails if it is no folder.
    pub fn open(root: &Path) -> io::Result<Self> {
        let privileged = rustix::process::geteuid().is_root();
        Ok(Self { root: Beneath::open(root)?, privileged, left_bytes: MAX_BYTES })
    }

    /// Reads an uncompressed layer and does what `pass` says.
    ///
    /// # Errors
    ///
    /// Fails if the archive is damaged, hostile or too large, or if the host refuses.
    pub fn apply(&mut self, layer: impl Read, pass: Pass) -> Result<(), LayerError> {
        let mut archive = Archive::new(layer);
        for (count, entry) in archive.entries().map_err(LayerError::Archive)?.enumerate() {
            let mut entry = entry.map_err(LayerError::Archive)?;
            if count >= MAX_ENTRIES {
                return Err(LayerError::TooLarge);
            }
            let bytes = entry.path_bytes().into_owned();
            let path = Path::new(OsStr::from_bytes(&bytes));
            let failed = |source| LayerError::Entry {
                path: crate::log_file::printable(&path.to_string_lossy()),
                source,
            };
            let Some(place) = Place::of(path).map_err(failed)? else { continue };
            let hidden = place.name.as_bytes().strip_prefix(WHITEOUT);
            match (pass, hidden) {
                (Pass::Whiteouts, Some(_)) => self.whiteout(&place).map_err(failed)?,
                (Pass::Entries, None) => {
                    self.left_bytes =
                        self.left_bytes.checked_sub(entry.size()).ok_or(LayerError::TooLarge)?;
                    self.add(&place, &mut entry).map_err(failed)?;
                }
                (Pass::Whiteouts, None) | (Pass::Entries, Some(_)) => {}
            }
        }
        Ok(())
    }

    fn whiteout(&self, place: &Place) -> io::Result<()> {
        let folder = match self.root.folder(&place.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            folder => folder?,
        };
        let name = place.name.as_bytes();
        if name == OPAQUE {
            return beneath::remove_contents(&folder);
        }
        match name.strip_prefix(WHITEOUT) {
            Some(b"" | b"." | b"..") | None => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "a whiteout of nothing"))
            }
            Some(hidden) => beneath::remove(&folder, OsStr::from_bytes(hidden)),
        }
    }

    fn add<R: Read>(&self, place: &Place, entry: &mut Entry<'_, R>) -> io::Result<()> {
        let folder = self.root.make_folder(&place.folder)?;
        let name = place.name.as_os_str();
        let kind = entry.header().entry_type();
        let keeps = kind == EntryType::Directory
            && beneath::kind(&folder, name)? == Some(FileType::Directory);
        if !keeps {
            beneath::remove(&folder, name)?;
        }
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                let file = openat(&folder, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
                let mut file = File::from(file);
                io::copy(entry, &mut file)?;
                file.flush()?;
                self.finish(file.as_fd(), entry)
            }
            EntryType::Directory => {
                if !keeps {
                    mkdirat(&folder, name, Mode::RWXU)?;
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
                let made = openat(&folder, name, flags | OFlags::CLOEXEC, Mode::empty())?;
                self.finish(made.as_fd(), entry)
            }
            EntryType::Symlink => self.add_symlink(&folder, name, entry),
            EntryType::Link => self.add_link(&folder, name, entry),
            EntryType::Fifo => {
                mknodat(&folder, name, FileType::Fifo, mode(entry)?, 0)?;
                self.own(&folder, name, entry)
            }
            // A container gets its devices from the runtime, on a file system of its own. A node
            // here would only be a way to the host's devices for whoever can reach the cache.
            EntryType::Char | EntryType::Block => {
                log::debug!("leaves out the device node {}", place.name.to_string_lossy());
                Ok(())
            }
            other => {
                log::debug!("leaves out an entry of type {other:?}");
                Ok(())
            }
        }
    }

    fn add_symlink<R: Read>(
        &self,
        folder: &OwnedFd,
        name: &OsStr,
        entry: &Entry<'_, R>,
    ) -> io::Result<()> {
        let to = entry.link_name_bytes().unwrap_or_default();
        symlinkat(OsStr::from_bytes(&to), folder, name)?;
        self.own(folder, name, entry)
    }

    fn add_link<R: Read>(
        &self,
        folder: &OwnedFd,
        name: &OsStr,
        entry: &Entry<'_, R>,
    ) -> io::Result<()> {
        let to = entry.link_name_bytes().unwrap_or_default();
        let nothing = || io::Error::new(io::ErrorKind::InvalidInput, "a link to nothing");
        let to = Place::of(Path::new(OsStr::from_bytes(&to)))?.ok_or_else(nothing)?;
        let source = self.root.folder(&to.folder)?;
        Ok(linkat(&source, &to.name, folder, name, AtFlags::empty())?)
    }

    fn own<R: Read>(&self, folder: &OwnedFd, name: &OsStr, entry: &Entry<'_, R>) -> io::Result<()> {
        if self.privileged {
            let (uid, gid) = owner(entry)?;
            chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Owner, attributes, mode and time, in this order: changing the owner clears set-uid bits and
    /// capabilities.
    fn finish<R: Read>(&self, file: impl AsFd, entry: &mut Entry<'_, R>) -> io::Result<()> {
        let mut mode = mode(entry)?;
        if self.privileged {
            let (uid, gid) = owner(entry)?;
            fchown(&file, Some(uid), Some(gid))?;
        } else {
            mode |= Mode::RUSR | Mode::WUSR;
            if entry.header().entry_type() == EntryType::Directory {
                mode |= Mode::XUSR;
            }
        }
        fchmod(&file, mode)?;
        if self.privileged {
            set_attributes(&file, entry)?;
        }
        let time = Timespec {
            tv_sec: i64::try_from(entry.header().mtime()?).unwrap_or_default(),
            tv_nsec: 0,
        };
        Ok(futimens(&file, &Timestamps { last_access: time, last_modification: time })?)
    }
}

fn owner<R: Read>(entry: &Entry<'_, R>) -> io::Result<(Uid, Gid)> {
    let out_of_range = |_error| io::Error::new(io::ErrorKind::InvalidData, "owner out of range");
    let id = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or(());
    let uid = id(entry.header().uid()?).map_err(out_of_range)?;
    let gid = id(entry.header().gid()?).map_err(out_of_range)?;
    Ok((Uid::from_raw(uid), Gid::from_raw(gid)))
}

fn mode<R: Read>(entry: &Entry<'_, R>) -> io::Result<Mode> {
    Ok(Mode::from_raw_mode(entry.header().mode()? & 0o7777))
}

fn set_attributes<R: Read>(file: impl AsFd, entry: &mut Entry<'_, R>) -> io::Result<()> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
    for extension in extensions {
        let extension = extension?;
        let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix(XATTR)) else {
            continue;
        };
        // `trusted.overlay.*` would speak to the overlay that the guest puts above; labels of the
        // host's security modules are the host's.
        if name == "security.capability" || name.starts_with("user.") {
            match fsetxattr(&file, name, extension.value_bytes(), XattrFlags::empty()) {
                Err(rustix::io::Errno::NOTSUP) => log::debug!("{name} can't be kept here"),
                set => set?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
