//! What is known on disk about a sandbox: `state.json` in its folder.
//!
//! Written whole and renamed into place, so a reader sees one state or the next. It carries a
//! version: a program that can't read it says so and leaves the sandbox alone.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    net::Ipv4Addr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::{log_file, name::SandboxName, passthrough::Binding};

/// The version of the format that this program writes and reads.
pub const VERSION: u32 = 1;
const FILE: &str = "state.json";
/// The largest state file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A process, told apart from a later one with the same id by when it started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// What it is.
    pub name: String,
    /// Its id.
    pub pid: i32,
    /// Its start, in clock ticks since the host's boot (proc(5), field 22 of stat).
    pub start_time: u64,
}

/// How far a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It is being made.
    Creating,
    /// Its container runs.
    Running,
    /// It has ended in an orderly way, with this exit code; nothing of it is left but this folder.
    Exited {
        /// The code of `nacre run`.
        code: u8,
    },
}

/// What gave a sandbox its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firewall {
    /// A table of nftables.
    Nft,
    /// Rules of iptables.
    Iptables,
}

/// What the host has for a sandbox's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Which pair of addresses it has: see [`crate::network::address`].
    pub index: u32,
    /// The host's interface.
    pub tap: String,
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// What translates its address, if the host has a route.
    pub firewall: Option<Firewall>,
    /// The interface whose forwarding was switched on for the sandbox.
    pub forwarding: Option<String>,
}

/// An interface of somebody else's network namespace whose frames are led to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinedRecord {
    /// Where the namespace is mounted.
    pub netns: PathBuf,
    /// The interface.
    pub interface: String,
}

/// All that is known about a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The format's version.
    pub version: u32,
    /// Its name.
    pub name: SandboxName,
    /// The process that owns it.
    pub supervisor: ProcessRecord,
    /// How far it is.
    pub phase: Phase,
    /// When it was made, in seconds since the Unix epoch.
    pub created_s: u64,
    /// The container's program and arguments.
    pub command: Vec<String>,
    /// The environment of the container's program.
    pub env: Vec<String>,
    /// The container's root file system on the host.
    pub rootfs: PathBuf,
    /// What it may use.
    pub cpus: u32,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// How many processors it can be given; 0 in records of earlier programs.
    #[serde(default)]
    pub max_cpus: u32,
    /// How much memory it can be given, in bytes.
    #[serde(default)]
    pub max_memory_bytes: u64,
    /// The backends and the VMM.
    pub children: Vec<ProcessRecord>,
    /// Its network.
    pub network: Option<NetworkRecord>,
    /// The interfaces of somebody else's network namespace that lead to it.
    #[serde(default)]
    pub joined: Vec<JoinedRecord>,
    /// The networks that it was given while it ran, by the device.
    #[serde(default)]
    pub added_networks: BTreeMap<String, NetworkRecord>,
    /// Its cgroup on the host.
    pub cgroup: Option<PathBuf>,
    /// The host's devices that were taken from their drivers for it.
    #[serde(default)]
    pub bindings: Vec<Binding>,
}

/// Why a record can't be had.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file can't be written.
    #[error("can't write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not what this program writes.
    #[error("{} is no state of a sandbox", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// It is of another version.
    #[error("{} has version {found}, this program reads version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version.
        found: u64,
    },
}

impl Record {
    /// All its networks.
    pub fn networks(&self) -> impl Iterator<Item = &NetworkRecord> {
        self.network.iter().chain(self.added_networks.values())
    }

    /// The network of this tap.
    pub(crate) fn network_mut(&mut self, tap: &str) -> Option<&mut NetworkRecord> {
        let mut all = self.network.iter_mut().chain(self.added_networks.values_mut());
        all.find(|network| network.tap == tap)
    }

    /// Reads the record in `folder`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Fails if there is one that can't be read.
    pub fn read(folder: &Path) -> Result<Option<Self>, RecordError> {
        let path = folder.join(FILE);
        let read = |source| RecordError::Read { path: path.clone(), source };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(read(error)),
            Ok(metadata) if metadata.len() > MAX_BYTES => {
                return Err(read(io::Error::from(io::ErrorKind::FileTooLarge)));
            }
            Ok(_) => {}
        }
        let bytes = fs::read(&path).map_err(read)?;
        let malformed = |source| RecordError::Malformed { path: path.clone(), source };
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(malformed)?;
        let found = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or_default();
        if found != u64::from(VERSION) {
            return Err(RecordError::Version { path, found });
        }
        serde_json::from_value(value).map(Some).map_err(malformed)
    }

    /// Writes it into `folder`, in the place of the one before.
    ///
    /// # Errors
    ///
    /// Fails as writing a file does.
    pub fn write(&self, folder: &Path) -> Result<(), RecordError> {
        let path = folder.join(FILE);
        let written = || -> io::Result<()> {
            let bytes = serde_json::to_vec_pretty(self)?;
            let new = folder.join(format!("{FILE}.new"));
            log_file::create(&new)?.write_all(&bytes)?;
            fs::rename(&new, &path)
        };
        written().map_err(|source| RecordError::Write { path: path.clone(), source })
    }
}

/// When the process started, in clock ticks since boot; `None` if there is no such process.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may itself hold any character;
    // what follows the last parenthesis begins with field 3. A zombie no longer counts.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

impl ProcessRecord {
    /// This process.
    #[must_use]
    pub fn this(name: &str) -> Self {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        Self { name: name.to_owned(), pid, start_time: start_time(pid).unwrap_or_default() }
    }

    /// A descriptor of it, if it still runs.
    #[must_use]
    pub fn open(&self) -> Option<OwnedFd> {
        // The descriptor first, then the check: what it refers to can't be exchanged after that.
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::NONBLOCK).ok()?;
        self.is_alive().then_some(pidfd)
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(name: &str) -> Record {
        Record {
            version: VERSION,
            name: name.parse().unwrap(),
            supervisor: ProcessRecord::this("supervisor"),
            phase: Phase::Running,
            created_s: 1,
            command: vec!["true".to_owned()],
            env: Vec::new(),
            rootfs: PathBuf::from("/"),
            cpus: 1,
            memory_bytes: 1 << 20,
            max_cpus: 2,
            max_memory_bytes: 1 << 21,
            children: Vec::new(),
            network: None,
            joined: Vec::new(),
            added_networks: BTreeMap::new(),
            cgroup: None,
            bindings: Vec::new(),
        }
    }

    #[test]
    fn a_record_reads_back_and_its_absence_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Record::read(folder.path()).unwrap().is_none());
        let mut written = record("a");
        written.phase = Phase::Exited { code: 3 };
        written.write(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap().unwrap(), written);
    }

    #[test]
    fn a_record_of_another_version_is_refused_as_such() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), r#"{"version": 2, "news": []}"#).unwrap();
        let error = Record::read(folder.path()).unwrap_err();
        assert!(matches!(error, RecordError::Version { found: 2, .. }), "{error}");
    }

    #[test]
    fn a_process_id_used_again_is_not_the_same_process() {
        let mut this = ProcessRecord::this("test");
        assert!(this.is_alive());
        this.start_time += 1;
        assert!(!this.is_alive());
    }
}
