//! Control groups, version 2: the agent's own leaf, and one group for each container.
//!
//! Limits are written by libcontainer; here groups are made, asked, emptied and removed.

use std::{
    fs, io,
    num::ParseIntError,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::Pid;
use tokio::time::sleep;

use crate::{ids::ContainerId, sys};

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "nacre-agent";
const CONTAINERS: &str = "nacre";
/// What the kernel keeps for the agent when memory runs out.
const AGENT_MEMORY_BYTES: u32 = 16 << 20;
/// How long a group may take to empty after its processes were killed.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// Why a control group could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// A file or folder of the group failed.
    #[error("can't {verb} {path:?}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel told something that is no number.
    #[error("no number in {path:?}")]
    Number {
        /// In which file.
        path: PathBuf,
        /// Why it is none.
        #[source]
        source: ParseIntError,
    },
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_path_buf();
    move |source| CgroupError::File { verb, path, source }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::write(path, text).map_err(failed("write", path))
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(failed("make", path)),
    }
}

/// Moves every process of the root into the agent's leaf and opens all controllers to containers.
///
/// A group with processes of its own can't hand controllers on (cgroup-v2, "no internal process").
pub(crate) fn set_up() -> Result<(), CgroupError> {
    let root = Path::new(ROOT);
    let agent = root.join(AGENT);
    let containers = root.join(CONTAINERS);
    make(&agent)?;
    make(&containers)?;
    for pid in pids(&root.join("cgroup.procs"))? {
        let moved = write(&agent.join("cgroup.procs"), &pid.as_raw_nonzero().to_string());
        if let Err(error) = moved {
            // The kernel's own threads stay where they are.
            log::debug!("process {} stays in the root: {error}", pid.as_raw_nonzero());
        }
    }
    let list = root.join("cgroup.controllers");
    let controllers = fs::read_to_string(&list).map_err(failed("read", &list))?;
    for controller in controllers.split_whitespace() {
        for group in [root, &containers] {
            write(&group.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    let floor = agent.join("memory.min");
    if floor.exists() {
        write(&floor, &AGENT_MEMORY_BYTES.to_string())?;
    }
    Ok(())
}

/// A container's control group; it exists from [`Self::make`] to [`Self::remove`].
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group's path as an OCI specification has it.
    pub(crate) fn spec_path(id: &ContainerId) -> PathBuf {
        Path::new("/").join(CONTAINERS).join(id)
    }

    /// Makes the group of a new container.
    pub(crate) fn make(id: &ContainerId) -> Result<Self, CgroupError> {
        let path = Path::new(ROOT).join(CONTAINERS).join(id);
        make(&path)?;
        Ok(Self { path })
    }

    /// Whether the out-of-memory killer struck in the group.
    pub(crate) fn oom_killed(&self) -> bool {
        // Without a memory controller there is no such file, and no limit to run into.
        fs::read_to_string(self.path.join("memory.events"))
            .is_ok_and(|events| count(&events, "oom_kill") > 0)
    }

    /// Sends a signal to every process of the group.
    pub(crate) fn signal_all(&self, signal: i32) -> Result<(), CgroupError> {
        if signal == libc::SIGKILL {
            // Also those that are being forked right now.
            return write(&self.path.join("cgroup.kill"), "1");
        }
        for pid in pids(&self.path.join("cgroup.procs"))? {
            match sys::signal_pid(pid, signal) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                other => other.map_err(failed("signal the processes of", &self.path))?,
            }
        }
        Ok(())
    }

    /// Kills what is left in the group and removes it, with what containers made below it.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.signal_all(libc::SIGKILL)?;
        let deadline = Instant::now() + REMOVE_LIMIT;
        let mut pause = Duration::from_millis(1);
        // The kernel empties a group after its processes are reaped; there is nothing to wait on
        // for nested groups, so the removal itself is tried until it works.
        while let Err(error) = remove_tree(&self.path) {
            if Instant::now() > deadline {
                return Err(failed("remove", &self.path)(error));
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn pids(list: &Path) -> Result<Vec<Pid>, CgroupError> {
    let text = fs::read_to_string(list).map_err(failed("read", list))?;
    let number = |line: &str| {
        let pid: i32 = line
            .parse()
            .map_err(|source| CgroupError::Number { path: list.to_path_buf(), source })?;
        Ok(Pid::from_raw(pid))
    };
    // The kernel writes 0 for processes of another PID namespace.
    text.lines().map(number).filter_map(Result::transpose).collect()
}

/// The value of `key` in a file of lines "key value"; 0 if absent.
fn count(events: &str, key: &str) -> u64 {
    events
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_counted_by_its_whole_name() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 9\n";
        assert_eq!(count(events, "oom_kill"), 2);
        assert_eq!(count(events, "absent"), 0);
    }

    #[test]
    fn a_container_has_a_group_of_its_own() {
        let id = ContainerId::parse("web").unwrap();
        assert_eq!(Cgroup::spec_path(&id), Path::new("/nacre/web"));
    }
}
