//! The host's cgroup of a sandbox: where its backends and its VMM are held to the host's limits.
//!
//! Only cgroup v2. Processes enter it themselves before their exec, so that not one page is
//! charged elsewhere.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags};

use crate::{name::SandboxName, size::ByteSize};

const ROOT: &str = "/sys/fs/cgroup";
/// How long a killed cgroup may take to become empty.
const EMPTY_WITHIN: Duration = Duration::from_secs(5);

/// What the host allows a whole sandbox, its processes included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// `memory.max`.
    pub memory: Option<ByteSize>,
    /// `pids.max`.
    pub pids: Option<u32>,
}

impl HostLimits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A limit could not be set.
#[derive(Debug, thiserror::Error)]
#[error("host limits: {}", path.display())]
pub struct CgroupError {
    path: PathBuf,
    source: io::Error,
}

/// Whether this machine has cgroup v2 where it belongs.
#[must_use]
pub fn is_available() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// A sandbox's cgroup; dropping it ends what is inside and removes it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

/// Where the cgroup of `name` is.
#[must_use]
pub fn path_of(name: &SandboxName) -> PathBuf {
    Path::new(ROOT).join("nacre").join(name.as_str())
}

impl Cgroup {
    /// Makes one with `limits`.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn create(path: PathBuf, limits: HostLimits) -> Result<Self, CgroupError> {
        let parent = path.parent().unwrap_or(Path::new(ROOT)).to_owned();
        let made = fs::create_dir_all(&path);
        made.map_err(|source| CgroupError { path: path.clone(), source })?;
        let cgroup = Self { path };
        write(&Path::new(ROOT).join("cgroup.subtree_control"), "+memory +pids")?;
        write(&parent.join("cgroup.subtree_control"), "+memory +pids")?;
        if let Some(memory) = limits.memory {
            write(&cgroup.path.join("memory.max"), &memory.0.to_string())?;
        }
        if let Some(pids) = limits.pids {
            write(&cgroup.path.join("pids.max"), &pids.to_string())?;
        }
        Ok(cgroup)
    }

    /// A descriptor of `cgroup.procs`, for a child to write itself into.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn procs(&self) -> Result<OwnedFd, CgroupError> {
        let path = self.path.join("cgroup.procs");
        rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| CgroupError { path, source: error.into() })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Ends what is in the cgroup at `path` and removes it.
pub fn remove(path: &Path) {
    if let Err(error) = fs::write(path.join("cgroup.kill"), "1") {
        log::debug!("{}: {error}", path.display());
    }
    let deadline = Instant::now() + EMPTY_WITHIN;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) if Instant::now() > deadline => {
                log::warn!("can't remove cgroup {}: {error}", path.display());
                return;
            }
            Err(_busy) => thread::sleep(Duration::from_millis(10)),
        }
    }
    // The folder above is everybody's: it stays as long as somebody is in it.
    if let Some(Err(error)) = path.parent().map(fs::remove_dir) {
        log::debug!("the sandboxes' cgroup stays: {error}");
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError { path: path.to_owned(), source })
}
