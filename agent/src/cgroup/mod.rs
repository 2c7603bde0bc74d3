//! Control groups, version 2: the agent's own leaf, and one group for each container.
//!
//! Groups are made, limited, stopped, asked, emptied and removed here; libcontainer only puts
//! processes into them.

use std::{
    fs::{self, File},
    io,
    num::ParseIntError,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nacre_proto::agent::StatsResponse;
use rustix::process::Pid;
use tokio::time::sleep;

use crate::{
    cgroup::{
        devices::Rule,
        limits::{Setting, Value},
    },
    ids::ContainerId,
    sys,
    text::chain,
};

pub(crate) mod devices;
pub(crate) mod limits;
mod stats;

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "nacre-agent";
const CONTAINERS: &str = "nacre";
/// What the kernel keeps for the agent when memory runs out.
const AGENT_MEMORY_BYTES: u32 = 16 << 20;
/// The agent's share of the processors, against containers that have all they can take.
const AGENT_CPU_WEIGHT: u32 = 10_000;
/// How long a killed process may take to end.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);
/// How long the processes of a group may take to stop, or to go on.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
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
    /// Something killed is still there.
    #[error("a killed process of {} does not end", .0.display())]
    Populated(PathBuf),
    /// The processes did not stop, or did not go on.
    #[error("the processes of {path:?} did not {verb} within {} s", FREEZE_LIMIT.as_secs())]
    Freeze {
        /// What they were to do.
        verb: &'static str,
        /// Which group.
        path: PathBuf,
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
    protect_agent(&agent)
}

/// Keeps memory and processor time for the agent, whatever the containers do.
fn protect_agent(agent: &Path) -> Result<(), CgroupError> {
    for (file, value) in [("memory.min", AGENT_MEMORY_BYTES), ("cpu.weight", AGENT_CPU_WEIGHT)] {
        let file = agent.join(file);
        // A machine that hands no controllers on, in tests, has no such file.
        if file.exists() {
            write(&file, &value.to_string())?;
        }
    }
    Ok(())
}

/// A container's control group; it exists from [`Self::make`] to [`Self::remove`].
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Who may use which device; empty: the group has no say in it. Locked while the kernel is told.
    devices: Mutex<Vec<Rule>>,
}

impl Cgroup {
    /// A folder that looks like a group.
    #[cfg(test)]
    pub(crate) fn of_tests(path: &Path) -> Self {
        Self { path: path.to_path_buf(), devices: Mutex::default() }
    }

    /// The group's path as an OCI specification has it.
    pub(crate) fn spec_path(id: &ContainerId) -> PathBuf {
        Path::new("/").join(CONTAINERS).join(id)
    }

    /// Makes the group of a new container.
    pub(crate) fn make(id: &ContainerId) -> Result<Self, CgroupError> {
        let path = Path::new(ROOT).join(CONTAINERS).join(id);
        make(&path)?;
        Ok(Self { path, devices: Mutex::default() })
    }

    /// Lets the group use devices by these rules from now on; by none if there are none.
    pub(crate) fn rule_devices(&self, rules: &[Rule]) -> Result<(), CgroupError> {
        self.change_rules(|own| *own = rules.to_vec())
    }

    /// Lets the group use a disk that came later.
    pub(crate) fn allow_disk(&self, (major, minor): (u32, u32)) -> Result<(), CgroupError> {
        self.change_rules(|own| {
            if !own.is_empty() {
                own.extend(devices::of_disk(major, minor));
            }
        })
    }

    fn change_rules(&self, change: impl FnOnce(&mut Vec<Rule>)) -> Result<(), CgroupError> {
        let mut own = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rules = own.clone();
        change(&mut rules);
        if !rules.is_empty() {
            let group = File::open(&self.path).map_err(failed("open", &self.path))?;
            sys::attach_device_program(&group, &devices::program(&rules))
                .map_err(failed("rule the devices of", &self.path))?;
        }
        *own = rules;
        Ok(())
    }

    /// Where the kernel counts what happened for want of memory.
    pub(crate) fn memory_events(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// How often the out-of-memory killer struck in the group. Without a memory controller there is
    /// no such file, and no limit to run into.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.memory_events());
        events.map_or(0, |events| count(&events, "oom_kill"))
    }

    /// What the group uses and used.
    pub(crate) fn stats(&self) -> StatsResponse {
        stats::read(&self.path)
    }

    /// Whether its processes are stopped, or are to be.
    pub(crate) fn is_frozen(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.freeze")).is_ok_and(|state| state.trim() == "1")
    }

    /// Stops the processes of the group and waits until they are, or lets them go on.
    ///
    /// What could not be stopped goes on.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let (switch, verb) = if frozen { ("1", "stop") } else { ("0", "go on") };
        let file = self.path.join("cgroup.freeze");
        write(&file, switch)?;
        let events = self.path.join("cgroup.events");
        let deadline = Instant::now() + FREEZE_LIMIT;
        let mut pause = Duration::from_millis(1);
        loop {
            let text = fs::read_to_string(&events).map_err(failed("read", &events))?;
            if (count(&text, "frozen") == 1) == frozen {
                return Ok(());
            }
            if Instant::now() > deadline {
                if frozen {
                    write(&file, "0")?;
                }
                return Err(CgroupError::Freeze { verb, path: self.path.clone() });
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Writes all settings, or leaves everything as it was.
    pub(crate) fn set(&self, settings: &[Setting]) -> Result<(), CgroupError> {
        let mut undo = Vec::new();
        for setting in settings {
            // Who limits all sizes of huge pages that a host has means those that this guest has.
            if setting.file.starts_with("hugetlb.") && !self.path.join(&setting.file).exists() {
                log::debug!("no {} here: there is nothing to limit", setting.file);
                continue;
            }
            match self.set_one(setting) {
                Ok(old) => undo.push(old),
                Err(error) => {
                    self.put_back(undo);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Writes one setting, and gives what it takes to undo that.
    fn set_one(&self, setting: &Setting) -> Result<(PathBuf, String), CgroupError> {
        let path = self.path.join(&setting.file);
        let old = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let new = match &setting.value {
            Value::Text(text) => text.clone(),
            Value::Period(period) => {
                let quota = old.split_whitespace().next().unwrap_or("max");
                format!("{quota} {period}")
            }
        };
        write(&path, &new)?;
        Ok((path, setting.undone(&old)))
    }

    /// Takes settings back, the last first.
    fn put_back(&self, undo: Vec<(PathBuf, String)>) {
        for (path, old) in undo.into_iter().rev() {
            if let Err(error) = write(&path, &old) {
                log::error!("a limit could not be put back: {}", chain(&error));
            }
        }
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

    /// Kills what is left in the group, and waits until it has ended.
    ///
    /// # Errors
    ///
    /// Fails if a process does not end in time, as one that waits for a device may not.
    pub(crate) async fn empty(&self) -> Result<(), CgroupError> {
        self.signal_all(libc::SIGKILL)?;
        let events = self.path.join("cgroup.events");
        let deadline = Instant::now() + EMPTY_LIMIT;
        let mut pause = Duration::from_millis(1);
        loop {
            let text = fs::read_to_string(&events).map_err(failed("read", &events))?;
            if count(&text, "populated") == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(CgroupError::Populated(self.path.clone()));
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
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

    /// A folder that looks like a group.
    fn group(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let folder = tempfile::tempdir().unwrap();
        for (file, text) in files {
            fs::write(folder.path().join(file), text).unwrap();
        }
        let cgroup = Cgroup::of_tests(folder.path());
        (folder, cgroup)
    }

    #[test]
    fn limits_are_set_all_or_none() {
        let files = [("pids.max", "max\n"), ("cpu.max", "50 100\n")];
        let (folder, cgroup) = group(&files);
        let text = |file: &str, value: &str| Setting {
            file: file.to_owned(),
            line: None,
            value: Value::Text(value.to_owned()),
        };
        let period = Setting { file: "cpu.max".to_owned(), line: None, value: Value::Period(200) };
        let read = |file: &str| fs::read_to_string(folder.path().join(file)).unwrap();
        let missing = [text("pids.max", "5"), period.clone(), text("memory.max", "1")];
        let error = cgroup.set(&missing).unwrap_err();
        assert!(error.to_string().contains("memory.max"), "{error}");
        assert_eq!((read("pids.max"), read("cpu.max")), ("max".to_owned(), "50 100".to_owned()));
        cgroup.set(&[text("hugetlb.1GB.max", "0"), text("pids.max", "5"), period]).unwrap();
        assert_eq!((read("pids.max"), read("cpu.max")), ("5".to_owned(), "50 200".to_owned()));
    }

    #[test]
    fn a_container_has_a_group_of_its_own() {
        let id = ContainerId::parse("web").unwrap();
        assert_eq!(Cgroup::spec_path(&id), Path::new("/nacre/web"));
    }
}
