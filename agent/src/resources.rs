//! Processors and memory that come to the running guest: used from when they are there.
//!
//! The kernel adds them offline. Here they are set online, again and again until what is expected
//! is there, for they come one by one, each when the kernel has taken notice of it. What is to go
//! needs nothing from here: the kernel sets it offline itself before it lets go of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::system::sysinfo;
use tokio::{task::spawn_blocking, time::sleep};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
/// The longest pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long anybody may wait.
const LIMIT: Duration = Duration::from_secs(600);

/// What the guest uses, or is to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// Processors that are online.
    pub(crate) cpus: u32,
    /// Memory that the kernel manages, in bytes.
    pub(crate) memory_bytes: u64,
}

/// Where the kernel lists processors and blocks of memory.
#[derive(Clone, Debug)]
struct Lists {
    cpus: PathBuf,
    memory: PathBuf,
}

/// Has the guest use what it was given, and answers what it uses as soon as that is `wanted`, or
/// `within` is over.
///
/// # Errors
///
/// Fails if the kernel does not tell.
pub(crate) async fn use_all(wanted: Used, within: Duration) -> io::Result<Used> {
    let lists = Lists { cpus: CPUS.into(), memory: MEMORY.into() };
    let deadline = Instant::now() + within.min(LIMIT);
    let mut pause = Duration::from_millis(1);
    loop {
        let lists = lists.clone();
        // Setting something online may take its time.
        let looked = spawn_blocking(move || lists.look(wanted)).await;
        let used = looked.map_err(io::Error::other)??;
        let is_enough = used.cpus >= wanted.cpus && used.memory_bytes >= wanted.memory_bytes;
        if is_enough || Instant::now() > deadline {
            return Ok(used);
        }
        sleep(pause).await;
        pause = (pause * 2).min(LOOK_EVERY);
    }
}

impl Lists {
    fn look(&self, wanted: Used) -> io::Result<Used> {
        let used = self.used()?;
        if used.cpus < wanted.cpus {
            set_online(&self.cpus, "cpu", "online", ("0", "1"));
        }
        if used.memory_bytes < wanted.memory_bytes {
            set_online(&self.memory, "memory", "state", ("offline", "online"));
        }
        self.used()
    }

    fn used(&self) -> io::Result<Used> {
        let online = fs::read_to_string(self.cpus.join("online"))?;
        let cpus = count(&online).ok_or_else(|| io::Error::other("no list of processors"))?;
        let info = sysinfo();
        let memory_bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
        Ok(Used { cpus, memory_bytes })
    }
}

/// Sets online what is not: in each folder of `list` called `prefix` and a number, `file` says so.
fn set_online(list: &Path, prefix: &str, file: &str, (off, on): (&str, &str)) {
    for entry in fs::read_dir(list).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
        if number.is_none_or(|number| number.parse::<u64>().is_err()) {
            continue;
        }
        let switch = entry.path().join(file);
        // One that can't be switched has no such file.
        if !fs::read_to_string(&switch).is_ok_and(|state| state.trim() == off) {
            continue;
        }
        match fs::write(&switch, on) {
            Ok(()) => log::info!("{} is online", name.display()),
            // It is tried again, and in the end the host is told how much there is.
            Err(error) => log::warn!("{} does not come online: {error}", name.display()),
        }
    }
}

/// How many numbers a list such as `0-3,5` has.
fn count(list: &str) -> Option<u32> {
    let mut sum: u32 = 0;
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum = sum.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_processors_is_counted() {
        assert_eq!(count("0\n"), Some(1));
        assert_eq!(count("0-3,5,8-9\n"), Some(7));
        assert_eq!(count("\n"), Some(0));
        assert_eq!(count("3-0"), None);
        assert_eq!(count("many"), None);
    }

    #[test]
    fn what_is_offline_is_set_online_and_nothing_else_is_touched() {
        let top = tempfile::tempdir().unwrap();
        let file = |name: &str| top.path().join(name).join("online");
        for (name, state) in [("cpu0", None), ("cpu1", Some("1\n")), ("cpu2", Some("0\n"))] {
            fs::create_dir(top.path().join(name)).unwrap();
            if let Some(state) = state {
                fs::write(file(name), state).unwrap();
            }
        }
        fs::create_dir(top.path().join("cpufreq")).unwrap();
        fs::write(file("cpufreq"), "0\n").unwrap();
        set_online(top.path(), "cpu", "online", ("0", "1"));
        let read = |name: &str| fs::read_to_string(file(name)).unwrap();
        assert_eq!((read("cpu1").as_str(), read("cpu2").as_str()), ("1\n", "1"));
        assert_eq!(read("cpufreq"), "0\n");
        assert!(!file("cpu0").exists());
    }

    #[tokio::test]
    async fn with_nothing_wanted_what_there_is_is_told_at_once() {
        let nothing = Used { cpus: 0, memory_bytes: 0 };
        let used = use_all(nothing, Duration::ZERO).await.unwrap();
        assert!(used.cpus > 0 && used.memory_bytes > 0);
    }
}
