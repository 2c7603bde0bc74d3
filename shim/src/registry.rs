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
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock},
    process::{Signal, pidfd_send_signal},
};

use crate::{
    cgroup,
    name::SandboxName,
    network::{self, address},
    paths::SandboxFiles,
    record::{Phase, ProcessRecord, Record, RecordError},
};

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

    fn lock(&self) -> Result<File, RegistryError> {
        let locked = || -> io::Result<File> {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(&self.root, flags, Mode::empty())?;
            flock(&folder, FlockOperation::LockExclusive)?;
            Ok(File::from(folder))
        };
        locked().map_err(|source| RegistryError::Folder { path: self.root.clone(), source })
    }

    /// Claims `record.name`. What a dead supervisor left under it is cleared away first.
    ///
    /// # Errors
    ///
    /// Fails if the name is in use, by a sandbox that runs or by one that has ended in order.
    pub fn claim(&self, record: Record) -> Result<Registration, RegistryError> {
        let _lock = self.lock()?;
        let folder = self.folder(&record.name);
        if folder.exists() {
            self.make_room(&record.name)?;
        }
        let made = DirBuilder::new().mode(0o700).create(&folder);
        made.map_err(|source| RegistryError::Folder { path: folder.clone(), source })?;
        let registration = Registration {
            registry: self.clone(),
            files: SandboxFiles::new(folder),
            record,
            stays: false,
        };
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
            record.children.iter().for_each(kill);
            if let Some(network) = &record.network {
                network::remove(network, self.forwarding_users(&record.name)?);
            }
            if let Some(path) = &record.cgroup {
                cgroup::remove(path);
            }
        }
        fs::remove_dir_all(&folder).map_err(|source| RegistryError::Folder { path: folder, source })
    }

    /// How many other sandboxes need the host to forward for them.
    fn forwarding_users(&self, except: &SandboxName) -> Result<usize, RegistryError> {
        let needs = |record: &&Record| {
            record.name != *except
                && !matches!(record.phase, Phase::Exited { .. })
                && record.network.as_ref().is_some_and(|network| network.firewall.is_some())
        };
        Ok(self.list()?.iter().filter(needs).count())
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

/// A claimed name and its record. Dropping it removes the folder, unless it was told to stay.
#[derive(Debug)]
pub struct Registration {
    registry: Registry,
    files: SandboxFiles,
    record: Record,
    stays: bool,
}

impl Registration {
    /// The sandbox's files.
    #[must_use]
    pub fn files(&self) -> &SandboxFiles {
        &self.files
    }

    /// What is recorded.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes the record, on disk too.
    ///
    /// # Errors
    ///
    /// Fails as writing a file does.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), RegistryError> {
        change(&mut self.record);
        self.write()
    }

    fn write(&self) -> Result<(), RegistryError> {
        Ok(self.record.write(self.files.folder())?)
    }

    /// Reserves addresses and the name of a tap that no other sandbox has.
    ///
    /// # Errors
    ///
    /// Fails if none is free.
    pub fn reserve_network(&mut self) -> Result<address::Pair, RegistryError> {
        let _lock = self.registry.lock()?;
        let taken: Vec<u32> = self
            .registry
            .list()?
            .iter()
            .filter_map(|record| record.network.as_ref().map(|network| network.index))
            .collect();
        let pair = address::free_pair(&taken, &address::host_routes())?;
        self.update(|record| record.network = Some(pair.record()))?;
        Ok(pair)
    }

    /// Whether another sandbox switched on forwarding of `uplink`.
    ///
    /// # Errors
    ///
    /// Fails if the registry can't be read.
    pub fn others_switched_on(&self, uplink: &str) -> Result<bool, RegistryError> {
        let switched = |record: &Record| {
            record.name != self.record.name
                && record
                    .network
                    .as_ref()
                    .is_some_and(|network| network.forwarding.as_deref() == Some(uplink))
        };
        Ok(self.registry.list()?.iter().any(switched))
    }

    /// Takes down what the host has for the network.
    pub fn release_network(&mut self) {
        let Some(network) = self.record.network.take() else { return };
        let users = self.registry.lock().and_then(|lock| {
            let users = self.registry.forwarding_users(&self.record.name);
            users.map(|users| (lock, users))
        });
        match users {
            Ok((_lock, users)) => network::remove(&network, users),
            Err(error) => {
                log::warn!("forwarding stays as it is: {error}");
                network::remove(&network, usize::MAX);
            }
        }
        if let Err(error) = self.write() {
            log::warn!("{error}");
        }
    }

    /// Records that the sandbox has ended in order and leaves its folder to `nacre rm`.
    ///
    /// # Errors
    ///
    /// Fails as writing a file does.
    pub fn keep(self, code: u8) -> Result<(), RegistryError> {
        let mut registration = self;
        registration.stay();
        registration.update(|record| {
            record.phase = Phase::Exited { code };
            record.children.clear();
        })
    }

    /// From now on the folder stays when this value is dropped.
    pub fn stay(&mut self) {
        self.stays = true;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.stays {
            remove_folder(self.files.folder());
        }
    }
}

fn remove_folder(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Ok(()) => log::debug!("removed {}", folder.display()),
        Err(error) => log::warn!("can't remove {}: {error}", folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;

    fn registry() -> (tempfile::TempDir, Registry) {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::open(folder.path().join("state")).unwrap();
        (folder, registry)
    }

    #[test]
    fn a_name_can_be_claimed_once_and_is_free_again_after_the_end() {
        let (_folder, registry) = registry();
        let first = registry.claim(record("a")).unwrap();
        let second = registry.claim(record("a")).unwrap_err();
        assert!(matches!(second, RegistryError::InUse { .. }), "{second}");
        drop(first);
        assert!(registry.list().unwrap().is_empty());
        drop(registry.claim(record("a")).unwrap());
    }

    #[test]
    fn what_a_dead_supervisor_left_is_replaced() {
        let (_folder, registry) = registry();
        let mut dead = record("a");
        dead.supervisor.start_time += 1;
        std::mem::forget(registry.claim(dead).unwrap());
        assert_eq!(registry.list().unwrap().iter().map(Life::of).collect::<Vec<_>>(), [Life::Dead]);
        let claimed = registry.claim(record("a")).unwrap();
        assert_eq!(Life::of(claimed.record()), Life::Running);
    }

    #[test]
    fn an_ended_sandbox_keeps_its_name_until_it_is_removed() {
        let (_folder, registry) = registry();
        registry.claim(record("a")).unwrap().keep(3).unwrap();
        assert!(registry.claim(record("a")).is_err());
        assert_eq!(Life::of(&registry.list().unwrap()[0]), Life::Exited(3));
        registry.remove(&"a".parse().unwrap()).unwrap();
        assert!(registry.remove(&"a".parse().unwrap()).is_err());
    }

    #[test]
    fn a_running_sandbox_is_not_removed() {
        let (_folder, registry) = registry();
        let _running = registry.claim(record("a")).unwrap();
        let error = registry.remove(&"a".parse().unwrap()).unwrap_err();
        assert!(matches!(error, RegistryError::Running(_)), "{error}");
    }

    #[test]
    fn two_sandboxes_get_different_addresses() {
        let (_folder, registry) = registry();
        let mut one = registry.claim(record("a")).unwrap();
        let mut other = registry.claim(record("b")).unwrap();
        assert_ne!(one.reserve_network().unwrap(), other.reserve_network().unwrap());
    }
}
