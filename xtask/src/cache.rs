//! The cache folder: everything that was fetched or made, each entry made once.
//!
//! An entry is made in a folder beside its place and renamed when it is complete, under a lock of
//! its own: two runs at once make it once, and a run that was killed leaves nothing half made.

use crate::report::say;
use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The variable that moves the cache folder.
pub const CACHE_VARIABLE: &str = "NACRE_CACHE";

const PRUNE_AGE: Duration = Duration::from_secs(24 * 3600);

/// The cache folder of this user.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the folder that `NACRE_CACHE` names, else `nacre` in the user's cache folder.
    ///
    /// # Errors
    /// No folder is known, or it cannot be made.
    pub fn open() -> Result<Self> {
        let from_env = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = from_env(CACHE_VARIABLE)
            .or_else(|| from_env("XDG_CACHE_HOME").map(|dir| dir.join("nacre")))
            .or_else(|| from_env("HOME").map(|dir| dir.join(".cache/nacre")));
        let Some(root) = root else { bail!("no cache folder: set {CACHE_VARIABLE} or HOME") };
        Self::at(&root)
    }

    /// Opens the cache in the given folder, which is made when it is missing.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root)
            .with_context(|| format!("cannot make the cache folder {}", root.display()))?;
        let root = fs::canonicalize(root)
            .with_context(|| format!("cannot resolve the cache folder {}", root.display()))?;
        Ok(Self { root })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A folder in the cache that several runs share, made when it is missing.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Takes the lock of this name until the returned file is dropped.
    ///
    /// # Errors
    /// The lock file cannot be made or locked.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join(format!("{name}.lock"));
        let file =
            File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }

    /// The lock of this name, as from [`Self::lock`], unless somebody has it.
    ///
    /// # Errors
    /// The lock file cannot be made.
    pub fn try_lock(&self, name: &str) -> Result<Option<File>> {
        let path = self.root.join(format!("{name}.lock"));
        let file =
            File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Returns the entry of this name; `make` makes it, at the path it is given, if it is missing.
    /// `what` is said before, since making may take a minute.
    ///
    /// # Errors
    /// Whatever `make` reports, or the entry cannot be put in its place.
    pub fn entry(
        &self,
        name: &str,
        what: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.root.join(name);
        if path.exists() {
            return Ok(path);
        }
        let _lock = self.lock(name)?;
        if path.exists() {
            return Ok(path);
        }
        say(what);
        let partial = self.root.join(format!("{name}.partial"));
        remove_any(&partial)?;
        make(&partial).with_context(|| format!("while making {name} in the cache"))?;
        fs::rename(&partial, &path)
            .with_context(|| format!("cannot put {} in its place", path.display()))?;
        Ok(path)
    }

    /// Removes the entries whose name starts like this and that were made more than a day ago,
    /// except this one: what is made again at every change must not pile up.
    pub fn prune(&self, start: &str, except: &Path) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        for entry in entries.flatten() {
            let made = entry.metadata().and_then(|meta| meta.modified());
            let age = made.ok().and_then(|made| made.elapsed().ok());
            let is_old = age.is_some_and(|age| age > PRUNE_AGE);
            let named = entry.file_name().to_string_lossy().starts_with(start);
            if named && is_old && entry.path() != except {
                // Left for the next time if it cannot be removed now.
                remove_any(&entry.path()).unwrap_or_default();
            }
        }
    }
}

/// A short name for content: equal for equal parts, different for different ones.
pub fn key(parts: &[&[u8]]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        digest.update(part);
    }
    digest.finalize()[..8].iter().fold(String::new(), |mut text, byte| {
        text.push_str(&format!("{byte:02x}"));
        text
    })
}

fn remove_any(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) | Err(_) => fs::remove_file(path),
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache")).unwrap();
        let first = cache.entry("x", "making x", |path| Ok(fs::write(path, "1")?)).unwrap();
        let again = cache.entry("x", "making x", |_| panic!("made twice")).unwrap();
        assert_eq!(first, again);
        assert_eq!(fs::read_to_string(again).unwrap(), "1");
    }

    #[test]
    fn a_failed_entry_is_not_there_and_can_be_made_later() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let failed = cache.entry("x", "making x", |path| {
            fs::create_dir(path)?;
            bail!("half made")
        });
        assert!(failed.is_err());
        assert!(!cache.root().join("x").exists());
        cache.entry("x", "making x", |path| Ok(fs::write(path, "2")?)).unwrap();
    }

    #[test]
    fn a_key_tells_where_its_parts_end() {
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
        assert_eq!(key(&[b"ab"]).len(), 16);
    }
}
