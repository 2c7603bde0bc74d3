//! Puts paths of the machine, which all lie beneath `/host`, at the same place in the host.

use anyhow::{Context, Result};
use rustix::mount::mount_bind;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Where the machine's root is mounted.
pub(crate) const SHARE: &str = "/host";

/// The paths that are in place already.
#[derive(Debug, Default)]
pub(super) struct Binds {
    made: BTreeSet<PathBuf>,
}

impl Binds {
    /// Puts each path in place, unless it lies in one that is.
    pub(super) fn make(&mut self, paths: &[PathBuf]) -> Result<()> {
        for path in paths {
            if path.ancestors().any(|above| self.made.contains(above)) {
                continue;
            }
            bind(path).with_context(|| format!("cannot share {} with the host", path.display()))?;
            self.made.insert(path.clone());
        }
        Ok(())
    }
}

fn bind(path: &Path) -> Result<()> {
    let within = path.strip_prefix("/").context("not an absolute path")?;
    let source = Path::new(SHARE).join(within);
    if fs::metadata(&source)?.is_dir() {
        fs::create_dir_all(path)?;
    } else {
        fs::create_dir_all(path.parent().context("no folder")?)?;
        // The mount point of a file is a file.
        drop(File::options().create(true).append(true).open(path)?);
    }
    mount_bind(&source, path)?;
    Ok(())
}
