//! What a container uses, as its guest tells it: bounded, with names that can do no harm, and
//! otherwise not to be believed.

use std::{
    collections::{BTreeMap, HashMap},
    time::SystemTime,
};

use nacre_proto::agent::{self, StatsResponse};

/// How many numbers of one kind are taken, and how many disks.
const MOST: usize = 256;
/// The longest name of a number, in bytes.
const NAME_BYTES: usize = 64;

/// Numbers by the names that the files of a cgroup have for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// Those of `told` whose names are of lower-case letters, digits, `_` and `.`, as the kernel's
    /// are.
    fn checked(told: &HashMap<String, u64>) -> Self {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '.');
        let is_name =
            |name: &&String| (1..=NAME_BYTES).contains(&name.len()) && name.chars().all(fits);
        let known = told.iter().filter(|(name, _count)| is_name(name)).take(MOST);
        Self(known.map(|(name, count)| (name.clone(), *count)).collect())
    }

    /// The number with this name, if the kernel told one. "max" is the largest number.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, count)| (name.as_str(), *count))
    }
}

/// A disk's line of `io.stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockUse {
    /// Of the guest's device.
    pub major: u32,
    /// Of the guest's device.
    pub minor: u32,
    /// rbytes, wbytes, rios, wios, dbytes, dios.
    pub counts: Counts,
}

/// How long processes waited: a line of a pressure file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PressureLine {
    /// Hundredths of a percent, 10000 at most, of the last ten seconds.
    pub avg10: u32,
    /// Of the last minute.
    pub avg60: u32,
    /// Of the last five minutes.
    pub avg300: u32,
    /// In microseconds.
    pub total_us: u64,
}

/// A pressure file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Some processes waited.
    pub some: PressureLine,
    /// All of them did.
    pub full: PressureLine,
}

/// See the module. What the guest's kernel does not tell is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// When it was so, and never later than it was heard of.
    pub at: SystemTime,
    /// `cpu.stat`.
    pub cpu: Counts,
    /// `memory.stat`.
    pub memory: Counts,
    /// `memory.events`.
    pub memory_events: Counts,
    /// current, max, peak, swap.current, swap.max of `memory.*`.
    pub memory_use: Counts,
    /// current, max of `pids.*`, and `pids.events`.
    pub pids: Counts,
    /// `io.stat`.
    pub io: Vec<BlockUse>,
    /// Of processors.
    pub cpu_pressure: Option<Pressure>,
    /// Of memory.
    pub memory_pressure: Option<Pressure>,
    /// Of disks.
    pub io_pressure: Option<Pressure>,
}

impl Stats {
    pub(super) fn checked(told: &StatsResponse) -> Self {
        let io = told.io.iter().take(MOST).map(|block| BlockUse {
            major: block.major,
            minor: block.minor,
            counts: Counts::checked(&block.counts),
        });
        let pressure = |kind: &str| told.pressure.get(kind).map(pressure);
        Self {
            at: super::containers::moment(told.at_ns),
            cpu: Counts::checked(&told.cpu),
            memory: Counts::checked(&told.memory),
            memory_events: Counts::checked(&told.memory_events),
            memory_use: Counts::checked(&told.memory_use),
            pids: Counts::checked(&told.pids),
            io: io.collect(),
            cpu_pressure: pressure("cpu"),
            memory_pressure: pressure("memory"),
            io_pressure: pressure("io"),
        }
    }
}

fn pressure(told: &agent::Pressure) -> Pressure {
    let line = |told: Option<&agent::PressureLine>| {
        told.map_or_else(PressureLine::default, |told| {
            let [avg10, avg60, avg300] =
                [told.avg10, told.avg60, told.avg300].map(|average| average.min(10_000));
            PressureLine { avg10, avg60, avg300, total_us: told.total }
        })
    };
    Pressure { some: line(told.some.as_ref()), full: line(told.full.as_ref()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_as_the_kernel_has_them_are_taken_and_not_too_many() {
        let mut told = StatsResponse::default();
        for name in ["usage_usec", "swap.current", "", "a b", "\x1b[2J", "Upper", &"x".repeat(65)] {
            told.cpu.insert(name.to_owned(), 7);
        }
        told.memory.extend((0..1000).map(|number| (format!("n{number}"), number)));
        let stats = Stats::checked(&told);
        let names: Vec<&str> = stats.cpu.iter().map(|(name, _count)| name).collect();
        assert_eq!(names, ["swap.current", "usage_usec"]);
        assert_eq!((stats.cpu.get("usage_usec"), stats.cpu.get("Upper")), (Some(7), None));
        assert_eq!(stats.memory.iter().count(), MOST);
    }

    #[test]
    fn a_pressure_is_at_most_all_of_the_time() {
        let line =
            agent::PressureLine { avg10: 20_000, total: 5, ..agent::PressureLine::default() };
        let told = agent::Pressure { some: Some(line).into(), ..agent::Pressure::default() };
        let mut response = StatsResponse::default();
        response.pressure.insert("io".to_owned(), told);
        let stats = Stats::checked(&response);
        let io = stats.io_pressure.unwrap();
        assert_eq!((io.some.avg10, io.some.total_us, io.full.avg10), (10_000, 5, 0));
        assert_eq!(stats.cpu_pressure, None);
    }
}
