//! The host's cgroup of a sandbox: where its backends and its VMM are held to the host's limits.
//!
//! Only cgroup v2. Processes enter it themselves before their exec, so that not one page is
//! charged elsewhere.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags};

use crate::{name::SandboxName, record::ProcessRecord, size::ByteSize};

const ROOT: &str = "/sys/fs/cgroup";
/// How long a killed cgroup may take to become empty.
const EMPTY_WITHIN: Duration = Duration::from_secs(5);

/// The period over which CPU time is counted, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// How many processors' time, in thousandths: `1.5` is one and a half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuShare {
    thousandths: u32,
}

/// A text that is no number of processors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no number of processors: one from 0.01 to 1000000 is expected, as in 1.5")]
pub struct CpuShareError(String);

impl FromStr for CpuShare {
    type Err = CpuShareError;

    fn from_str(text: &str) -> Result<Self, CpuShareError> {
        let malformed = || CpuShareError(text.to_owned());
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(part) || part.len() > 3 || whole.len() > 7 {
            return Err(malformed());
        }
        let number = |text: &str| text.parse::<u32>().map_err(|_overflow| malformed());
        let thousandths = number(whole)?.checked_mul(1000).ok_or_else(malformed)?;
        let thousandths = thousandths.saturating_add(number(&format!("{part:0<3}"))?);
        // The kernel takes no less than a millisecond of each period.
        if (10..=1_000_000_000).contains(&thousandths) {
            Ok(Self { thousandths })
        } else {
            Err(malformed())
        }
    }
}

/// What the host allows a whole sandbox, its processes included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// `memory.max`.
    pub memory: Option<ByteSize>,
    /// `pids.max`.
    pub pids: Option<u32>,
    /// `cpu.max`.
    pub cpus: Option<CpuShare>,
}

impl HostLimits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Controller, file and value of each.
    fn settings(&self) -> Vec<(&'static str, &'static str, String)> {
        let memory = self.memory.map(|bytes| ("memory", "memory.max", bytes.0.to_string()));
        let pids = self.pids.map(|count| ("pids", "pids.max", count.to_string()));
        let cpus = self.cpus.map(|share| {
            let quota_us = CPU_PERIOD_US * u64::from(share.thousandths) / 1000;
            ("cpu", "cpu.max", format!("{quota_us} {CPU_PERIOD_US}"))
        });
        [memory, pids, cpus].into_iter().flatten().collect()
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

/// Where the cgroup of the sandbox `name` is. No two have the same: state folders may have
/// sandboxes of one name, but a supervisor has one sandbox, and is told from all other processes
/// since the host's boot by its id and start.
#[must_use]
pub fn path_of(name: &SandboxName, supervisor: &ProcessRecord) -> PathBuf {
    let ProcessRecord { pid, start_time, .. } = supervisor;
    Path::new(ROOT).join("nacre").join(format!("{name}-{pid}-{start_time}"))
}

impl Cgroup {
    /// Makes one with `limits`.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn create(path: PathBuf, limits: HostLimits) -> Result<Self, CgroupError> {
        let cgroup = Self::make(path)?;
        let parent = cgroup.path.parent().unwrap_or(Path::new(ROOT));
        for (controller, file, value) in limits.settings() {
            for above in [Path::new(ROOT), parent] {
                write(&above.join("cgroup.subtree_control"), &format!("+{controller}"))?;
            }
            write(&cgroup.path.join(file), &value)?;
        }
        Ok(cgroup)
    }

    /// The folder above goes with the last sandbox, maybe just now: then it is made once more.
    fn make(path: PathBuf) -> Result<Self, CgroupError> {
        let mut tries_left = 10;
        loop {
            let parent = fs::create_dir_all(path.parent().unwrap_or(Path::new(ROOT)));
            match parent.and_then(|()| fs::create_dir(&path)) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries_left > 0 => {
                    tries_left -= 1;
                }
                Err(source) => return Err(CgroupError { path, source }),
            }
        }
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

impl Cgroup {
    /// How many of its processes the kernel killed for want of memory.
    fn memory_kills(&self) -> Option<u64> {
        let events = fs::read_to_string(self.path.join("memory.events")).ok()?;
        events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Some(kills @ 1..) = self.memory_kills() {
            log::error!(
                "the host's memory limit was reached, and the host's kernel killed {kills} of the \
                 sandbox's processes"
            );
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_processors_are_read_to_the_thousandth() {
        for (text, thousandths) in [("1", 1000), ("1.5", 1500), ("0.01", 10), ("2.125", 2125)] {
            assert_eq!(text.parse(), Ok(CpuShare { thousandths }), "{text}");
        }
        for text in ["", "0", "0.001", ".5", "1.", "-1", "1.2345", "1,5", "4294968", "9999999"] {
            assert!(text.parse::<CpuShare>().is_err(), "{text}");
        }
    }

    #[test]
    fn limits_become_the_kernels_files() {
        let limits = HostLimits {
            memory: Some(ByteSize(1 << 20)),
            pids: None,
            cpus: Some(CpuShare { thousandths: 500 }),
        };
        let expected = [("memory", "memory.max", "1048576"), ("cpu", "cpu.max", "50000 100000")];
        let expected =
            expected.map(|(controller, file, value)| (controller, file, value.to_owned()));
        assert_eq!(limits.settings(), expected);
        assert!(HostLimits::default().settings().is_empty());
    }

    #[test]
    fn sandboxes_of_one_name_have_cgroups_of_their_own() {
        let name: SandboxName = "web".parse().unwrap();
        let this = ProcessRecord::this("supervisor");
        let other = ProcessRecord { pid: this.pid + 1, ..this.clone() };
        assert_ne!(path_of(&name, &this), path_of(&name, &other));
    }
}
