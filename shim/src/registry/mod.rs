//! All sandboxes of this machine: claiming a name, listing, and clearing away what a dead
//! supervisor left.
//!
//! A lock on the registry's folder is held for each step that looks and then acts, and never
//! longer. A claimed name is a folder; whoever holds the [`Registration`] owns the record inside.
//! A record whose supervisor is gone and which has not ended in order is *stale*.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    time::Duration,
};

use nacre_proto::exit::RunExit;
use rustix::process::{Signal, pidfd_send_signal};

use crate::{
    cgroup, error_chain, lock,
    name::SandboxName,
    network::{self, address, namespace},
    passthrough::{Host, binding},
    paths::SandboxFiles,
    record::{NetworkRecord, Phase, ProcessRecord, Record, RecordError},
};

mod registration;
mod tree;

pub use registration::Registration;

/// How long others may hold the lock. Generous: they run programs of the host while they do.
const LOCKED_WITHIN: Duration = Duration::from_secs(120);

/// Why the registry refuses.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The folder can't be made, read or locked.
    #[error("state folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another sandbox has the name.
    #[error("the name `{name}` is in use by {by}")]
    InUse {
        /// The name.
        name: SandboxName,
        /// In what way.
        by: &'static str,
    },
    /// There is no such sandbox.
    #[error("there is no sandbox `{0}`")]
    Unknown(SandboxName),
    /// It runs and must not.
    #[error("sandbox `{0}` is running: stop it first, or use -f")]
    Running(SandboxName),
    /// It must run and does not.
    #[error("sandbox `{name}` is not running: it {how}")]
    NotRunning {
        /// Which.
        name: SandboxName,
        /// What it is instead.
        how: String,
    },
    /// Its record is bad.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// All addresses are taken.
    #[error(transparent)]
    Address(#[from] address::NoneFree),
}

impl RegistryError {
    /// The exit code of a command that fails by it.
    #[must_use]
    pub fn exit(&self) -> RunExit {
        match self {
            Self::InUse { .. } | Self::Unknown(_) | Self::Running(_) | Self::NotRunning { .. } => {
                RunExit::Name
            }
            Self::Address(_) => RunExit::Network,
            Self::Folder { .. } | Self::Record(_) => RunExit::Setup,
        }
    }
}

/// What became of a sandbox, judged by its record and its supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Being made.
    Creating,
    /// Its supervisor is alive and its container runs.
    Running,
    /// Ended in order.
    Exited(u8),
    /// Its supervisor is gone and left it behind.
    Dead,
}

impl Life {
    /// By the record.
    #[must_use]
    pub fn of(record: &Record) -> Self {
        match (record.phase, record.supervisor.is_alive()) {
            (Phase::Exited { code }, _) => Self::Exited(code),
            (_, false) => Self::Dead,
            (Phase::Creating, true) => Self::Creating,
            (Phase::Running, true) => Self::Running,
        }
    }
}

/// The sandboxes below one folder.
#[derive(Clone, Debug)]
pub struct Registry {
    root: PathBuf,
}

impl Registry {
    /// The registry in `root`, which is made if it is not there, private to its owner.
    ///
    /// # Errors
    ///
    /// Fails if the folder can't be made.
    pub fn open(root: PathBuf) -> Result<Self, RegistryError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(|source| RegistryError::Folder { path: root.clone(), source })?;
        Ok(Self { root })
    }

    fn folder(&self, name: &SandboxName) -> PathBuf {
        self.root.join(name.as_str())
    }

    /// Where the files of the sandbox `name` are, or would be.
    #[must_use]
    pub fn files(&self, name: &SandboxName) -> SandboxFiles {
        SandboxFiles::new(self.folder(name))
    }

    fn lock(&self) -> Result<File, RegistryError> {
        lock::exclusive(&self.root, LOCKED_WITHIN, || Ok(()))
            .map_err(|source| RegistryError::Folder { path: self.root.clone(), source })
    }

    /// Claims `record.name`. What a dead supervisor left under it is cleared away first.
    ///
    /// # Errors
    ///
    /// Fails if the name is in use, by a sandbox that runs or by one that has ended in order.
    pub fn claim(&self, record: Record) -> Result<Registration, RegistryError> {
        let _lock = self.lock()?;
        self.sweep(&record.name)?;
        let folder = self.folder(&record.name);
        if folder.exists() {
            self.make_room(&record.name)?;
        }
        let made = DirBuilder::new().mode(0o700).create(&folder);
        made.map_err(|source| RegistryError::Folder { path: folder.clone(), source })?;
        let registration = Registration::new(self.clone(), SandboxFiles::new(folder), record);
        registration.write()?;
        Ok(registration)
    }

    fn make_room(&self, name: &SandboxName) -> Result<(), RegistryError> {
        let by = match Record::read(&self.folder(name))?.as_ref().map(Life::of) {
            Some(Life::Creating | Life::Running) => "a running sandbox",
            Some(Life::Exited(_)) => "an ended sandbox (remove it with `nacre rm`)",
            // No record: its maker died between two steps, or this is no sandbox's folder.
            Some(Life::Dead) | None => {
                log::warn!("clears away what a dead supervisor left of sandbox `{name}`");
                return self.clear(name);
            }
        };
        Err(RegistryError::InUse { name: name.clone(), by })
    }

    /// Takes down what dead supervisors of other sandboxes left. Those that have a log keep their
    /// folder, and their name, until they are removed.
    fn sweep(&self, except: &SandboxName) -> Result<(), RegistryError> {
        for listed in self.list()? {
            if listed.name == *except || Life::of(&listed) != Life::Dead {
                continue;
            }
            let files = SandboxFiles::new(self.folder(&listed.name));
            // It may have ended in order since it was listed, and be gone or say so.
            let Some(mut record) = Record::read(files.folder())? else { continue };
            if Life::of(&record) != Life::Dead {
                continue;
            }
            if files.output().exists() {
                self.take_down(&record)?;
                (record.network, record.cgroup) = (None, None);
                record.added_networks.clear();
                record.joined.clear();
                record.children.clear();
                record.bindings.clear();
                record.write(files.folder())?;
            } else {
                log::info!("clears away what is left of sandbox `{}`", record.name);
                self.clear(&record.name)?;
            }
        }
        Ok(())
    }

    /// The record of `name`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such sandbox.
    pub fn find(&self, name: &SandboxName) -> Result<(Record, SandboxFiles), RegistryError> {
        let folder = self.folder(name);
        let record = Record::read(&folder)?.ok_or_else(|| RegistryError::Unknown(name.clone()))?;
        Ok((record, SandboxFiles::new(folder)))
    }

    /// The record of `name`, which has to be running.
    ///
    /// # Errors
    ///
    /// Fails if there is no such sandbox or it does not run.
    pub fn find_running(
        &self,
        name: &SandboxName,
    ) -> Result<(Record, SandboxFiles), RegistryError> {
        let (record, files) = self.find(name)?;
        let how = match Life::of(&record) {
            Life::Running => return Ok((record, files)),
            Life::Creating => "is still being made".to_owned(),
            Life::Exited(code) => format!("has ended with code {code}"),
            Life::Dead => "lost its supervisor".to_owned(),
        };
        Err(RegistryError::NotRunning { name: name.clone(), how })
    }

    /// All sandboxes, by name. Records that can't be read are reported and left out.
    ///
    /// # Errors
    ///
    /// Fails if the folder can't be read.
    pub fn list(&self) -> Result<Vec<Record>, RegistryError> {
        let error = |source| RegistryError::Folder { path: self.root.clone(), source };
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(error)? {
            let path = entry.map_err(error)?.path();
            match Record::read(&path) {
                Ok(record) => records.extend(record),
                Err(bad) => log::warn!("{bad}"),
            }
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    /// Records that `name`, whose folder stayed, has ended with `code`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such sandbox.
    pub fn mark_exited(&self, name: &SandboxName, code: u8) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        let (mut record, files) = self.find(name)?;
        record.phase = Phase::Exited { code };
        record.children.clear();
        Ok(record.write(files.folder())?)
    }

    /// Removes a sandbox that no longer runs, and all that is left of it.
    ///
    /// # Errors
    ///
    /// Fails if there is no such sandbox, or it runs.
    pub fn remove(&self, name: &SandboxName) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        if !self.folder(name).exists() {
            return Err(RegistryError::Unknown(name.clone()));
        }
        let life = Record::read(&self.folder(name))?.as_ref().map(Life::of);
        match life {
            Some(Life::Creating | Life::Running) => Err(RegistryError::Running(name.clone())),
            Some(Life::Exited(_) | Life::Dead) | None => self.clear(name),
        }
    }

    /// Clears away everything of a sandbox without a supervisor. The lock is held.
    fn clear(&self, name: &SandboxName) -> Result<(), RegistryError> {
        let folder = self.folder(name);
        if let Some(record) = Record::read(&folder)? {
            self.take_down(&record)?;
        }
        match tree::remove(&folder) {
            // Its own supervisor removed it first.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(|source| RegistryError::Folder { path: folder, source }),
        }
    }

    /// Ends and removes all that a record names but the folder. The lock is held.
    fn take_down(&self, record: &Record) -> Result<(), RegistryError> {
        record.children.iter().for_each(kill);
        let taps: Vec<&str> = record.networks().map(|network| network.tap.as_str()).collect();
        for network in record.networks() {
            network::remove(network, self.forwarding_users(&taps)?);
        }
        record.joined.iter().for_each(namespace::leave);
        tree::detach(&self.folder(&record.name))
            .map_err(|source| RegistryError::Folder { path: self.folder(&record.name), source })?;
        if let Some(path) = &record.cgroup {
            cgroup::remove(path);
        }
        for binding in record.bindings.iter().rev() {
            // Waits until the VMM, which was killed above, has let go of it.
            if let Err(error) = binding::give_back(&Host::default(), binding) {
                let address = &binding.address;
                log::warn!("device {address} is not given back: {}", error_chain(&error));
            }
        }
        Ok(())
    }

    /// How many networks but those of `taps` need the host to forward for them.
    fn forwarding_users(&self, taps: &[&str]) -> Result<usize, RegistryError> {
        let needs = |network: &&NetworkRecord| {
            !taps.contains(&network.tap.as_str()) && network.firewall.is_some()
        };
        let records = self.list()?;
        let records = records.iter().filter(|record| !matches!(record.phase, Phase::Exited { .. }));
        Ok(records.flat_map(Record::networks).filter(needs).count())
    }
}

fn kill(process: &ProcessRecord) {
    if let Some(pidfd) = process.open() {
        log::warn!(
            "ends {} (process {}), which outlived its supervisor",
            process.name,
            process.pid
        );
        if let Err(error) = pidfd_send_signal(&pidfd, Signal::KILL) {
            log::warn!("process {} was not killed: {error}", process.pid);
        }
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
