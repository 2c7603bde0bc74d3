//! Where things are: the other programs, the guest's kernel, state and cache.

use std::{
    env, io,
    path::{Path, PathBuf},
};

/// Where the state of all sandboxes is, unless `NACRE_STATE` says otherwise.
const STATE: &str = "/run/nacre";
/// Where unpacked images are, unless `NACRE_CACHE` says otherwise.
const CACHE: &str = "/var/cache/nacre";

/// The folder of all sandboxes.
#[must_use]
pub fn state_root() -> PathBuf {
    env::var_os("NACRE_STATE").map_or_else(|| PathBuf::from(STATE), PathBuf::from)
}

/// The folder of what may be made again.
#[must_use]
pub fn cache_root() -> PathBuf {
    env::var_os("NACRE_CACHE").map_or_else(|| PathBuf::from(CACHE), PathBuf::from)
}

/// The folder of this program, where the backends and the VMM are too.
///
/// # Errors
///
/// Fails if the kernel can't tell.
pub fn own_folder() -> io::Result<PathBuf> {
    let program = env::current_exe()?;
    Ok(program.parent().unwrap_or(Path::new("/")).to_owned())
}

/// The files in a sandbox's folder.
#[derive(Clone, Debug)]
pub struct SandboxFiles {
    folder: PathBuf,
}

impl SandboxFiles {
    /// Those of the sandbox in `folder`.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The socket through which the host reaches the guest's vsock ports.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.folder.join("vsock")
    }

    /// The socket at which the supervisor answers.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.folder.join("ctl")
    }

    /// What a pod's guest sees of the host's files.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.folder.join("shared")
    }

    /// What the guest's kernel printed.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// What the container of a detached sandbox printed.
    #[must_use]
    pub fn output(&self) -> PathBuf {
        self.folder.join("output.log")
    }

    /// What the supervisor of a detached sandbox has to say.
    #[must_use]
    pub fn supervisor_log(&self) -> PathBuf {
        self.folder.join("supervisor.log")
    }

    /// What the child called `name` printed.
    #[must_use]
    pub fn child_log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }
}
