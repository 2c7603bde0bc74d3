//! A folder whose insides are untrusted: every access is resolved by the kernel as if the folder
//! were the root of the file system, so no name, `..` or symbolic link leads out of it.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2, unlinkat},
    io::Errno,
};

/// How many symbolic links or missing folders a path may lead through while folders are made.
const MAX_DEPTH: usize = 256;

/// An untrusted folder.
#[derive(Debug)]
pub struct Beneath {
    root: OwnedFd,
}

/// A path taken apart: the folder it is in and its last part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder, relative to the root; empty is the root.
    pub folder: PathBuf,
    /// The name inside it.
    pub name: std::ffi::OsString,
}

impl Place {
    /// Takes `path` apart. A leading `/` means the root; `None` for the root itself.
    ///
    /// # Errors
    ///
    /// Fails if a part is `..`.
    pub fn of(path: &Path) -> Result<Option<Self>, io::Error> {
        let mut parts = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(part) => parts.push(part),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, "a path with `..`"));
                }
            }
        }
        if parts.len() > MAX_DEPTH {
            return Err(io::Error::from(io::ErrorKind::InvalidFilename));
        }
        Ok(parts.pop().map(|name| Self { folder: parts.iter().collect(), name: name.to_owned() }))
    }
}

impl Beneath {
    /// Opens `root`, which is trusted itself.
    ///
    /// # Errors
    ///
    /// Fails if it is no folder.
    pub fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { root: rustix::fs::openat(CWD, root, flags, Mode::empty())? })
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn file(&self, path: &Path) -> io::Result<File> {
        // Without blocking: a FIFO would wait for its writer for ever.
        let file = File::from(self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
        }
    }

    /// Reads a regular file of at most `max_bytes`.
    ///
    /// # Errors
    ///
    /// Fails if there is none or it is larger.
    pub fn read(&self, path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = self.file(path)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
        if u64::try_from(read).is_ok_and(|read| read <= max_bytes) {
            Ok(bytes)
        } else {
            Err(io::Error::from(io::ErrorKind::FileTooLarge))
        }
    }

    /// Opens a folder; its descriptor serves the `*at` calls.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY)?)
    }

    /// Opens a folder, making it and the ones above where they are missing.
    ///
    /// # Errors
    ///
    /// Fails if something else is in the way.
    pub fn make_folder(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {}
            opened => return Ok(opened?),
        }
        let parts: Vec<&OsStr> = path.iter().collect();
        for end in 1..=parts.len() {
            let part: PathBuf = parts[..end].iter().collect();
            match self.resolve(&part, OFlags::RDONLY | OFlags::DIRECTORY) {
                Err(Errno::NOENT) => {
                    let above: PathBuf = parts[..end - 1].iter().collect();
                    let above = self.resolve(&above, OFlags::RDONLY | OFlags::DIRECTORY)?;
                    mkdirat(&above, parts[end - 1], Mode::from_raw_mode(0o755))?;
                }
                there => drop(there?),
            }
        }
        self.folder(path)
    }
}

/// Removes whatever `name` is in `folder`, with all that is below it. Never follows a link.
///
/// # Errors
///
/// Fails if the kernel refuses; that nothing is there is no error.
pub fn remove(folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inside = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    remove_contents(&inside)?;
    Ok(unlinkat(folder, name, AtFlags::REMOVEDIR)?)
}

/// Removes all that is in `folder`.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn remove_contents(folder: &OwnedFd) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    names.iter().try_for_each(|name| remove(folder, OsStr::from_bytes(name)))
}

/// What `name` in `folder` is, itself and not what it links to; `None` if nothing.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn kind(folder: &OwnedFd, name: &OsStr) -> io::Result<Option<FileType>> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn links_are_resolved_inside() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(folder.path().join("passwd"), "outside").unwrap();
        fs::write(root.join("passwd"), "inside").unwrap();
        symlink("../../../passwd", root.join("etc/up")).unwrap();
        symlink("/passwd", root.join("etc/absolute")).unwrap();
        let beneath = Beneath::open(&root).unwrap();
        for path in ["etc/up", "etc/absolute", "/passwd", "../passwd"] {
            assert_eq!(beneath.read(Path::new(path), 100).unwrap(), b"inside", "{path}");
        }
        assert!(beneath.read(Path::new("passwd"), 5).is_err());
    }

    #[test]
    fn folders_are_made_behind_links_inside() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("usr/lib")).unwrap();
        symlink("/usr/lib", root.join("lib")).unwrap();
        let beneath = Beneath::open(&root).unwrap();
        beneath.make_folder(Path::new("lib/a/b")).unwrap();
        assert!(root.join("usr/lib/a/b").is_dir());
    }

    #[test]
    fn a_path_that_climbs_is_refused() {
        assert!(Place::of(Path::new("a/../../b")).is_err());
        assert_eq!(Place::of(Path::new("./")).unwrap(), None);
        let place = Place::of(Path::new("/a/./b")).unwrap().unwrap();
        assert_eq!(place, Place { folder: "a".into(), name: "b".into() });
    }

    #[test]
    fn removal_does_not_follow_links() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("kept")).unwrap();
        fs::write(folder.path().join("kept/file"), "").unwrap();
        fs::create_dir_all(folder.path().join("gone/deep")).unwrap();
        symlink(folder.path().join("kept"), folder.path().join("gone/deep/link")).unwrap();
        let beneath = Beneath::open(folder.path()).unwrap();
        remove(&beneath.folder(Path::new("")).unwrap(), OsStr::new("gone")).unwrap();
        assert!(!folder.path().join("gone").exists());
        assert!(folder.path().join("kept/file").exists());
    }
}
