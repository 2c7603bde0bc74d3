//! What a group uses and used, from its files.
//!
//! A file that is not there (no such controller) is left out; a line that makes no sense too.

use std::{collections::HashMap, fs, path::Path};

use nacre_proto::agent::{BlockUse, Pressure, PressureLine, StatsResponse};

use crate::process::reap::now_ns;

/// Reads everything that the group at `path` tells.
pub(crate) fn read(path: &Path) -> StatsResponse {
    let text = |file: &str| fs::read_to_string(path.join(file)).ok();
    let counted = |file: &str| text(file).map_or_else(HashMap::new, |text| counts(&text));
    let single = |controller: &str, names: &[&str]| -> HashMap<String, u64> {
        let value = |name: &&str| {
            Some(((*name).to_owned(), number(text(&format!("{controller}.{name}"))?.trim())?))
        };
        names.iter().filter_map(value).collect()
    };
    let mut pids = single("pids", &["current", "max"]);
    let refused = counted("pids.events").remove("max");
    pids.extend(refused.map(|count| ("events.max".to_owned(), count)));
    let pressures = ["cpu", "memory", "io"];
    let pressure_of =
        |name: &&str| Some(((*name).to_owned(), pressure(&text(&format!("{name}.pressure"))?)));
    StatsResponse {
        at_ns: now_ns(),
        cpu: counted("cpu.stat"),
        memory: counted("memory.stat"),
        memory_events: counted("memory.events"),
        memory_use: single("memory", &["current", "max", "peak", "swap.current", "swap.max"]),
        pids,
        io: text("io.stat").map_or_else(Vec::new, |text| blocks(&text)),
        pressure: pressures.iter().filter_map(pressure_of).collect(),
        ..StatsResponse::new()
    }
}

fn number(text: &str) -> Option<u64> {
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

/// A file of lines "name number".
pub(super) fn counts(text: &str) -> HashMap<String, u64> {
    let pair = |line: &str| {
        let (name, count) = line.split_once(' ')?;
        Some((name.to_owned(), number(count.trim())?))
    };
    text.lines().filter_map(pair).collect()
}

/// `io.stat`: lines "major:minor name=number ...".
fn blocks(text: &str) -> Vec<BlockUse> {
    let block = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let pair = |word: &str| {
            let (name, count) = word.split_once('=')?;
            Some((name.to_owned(), number(count)?))
        };
        Some(BlockUse {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            counts: rest.split_whitespace().filter_map(pair).collect(),
            ..BlockUse::new()
        })
    };
    text.lines().filter_map(block).collect()
}

/// A pressure file: lines "some avg10=0.00 avg60=0.00 avg300=0.00 total=0".
fn pressure(text: &str) -> Pressure {
    let mut pressure = Pressure::new();
    for line in text.lines() {
        let Some((kind, rest)) = line.split_once(' ') else { continue };
        let value = |name: &str| {
            rest.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let share = |name| value(name).and_then(hundredths).unwrap_or(0);
        let parsed = PressureLine {
            avg10: share("avg10"),
            avg60: share("avg60"),
            avg300: share("avg300"),
            total: value("total").and_then(number).unwrap_or(0),
            ..PressureLine::new()
        };
        match kind {
            "some" => pressure.some = Some(parsed).into(),
            "full" => pressure.full = Some(parsed).into(),
            _ => {}
        }
    }
    pressure
}

/// "12.34" as 1234.
fn hundredths(text: &str) -> Option<u32> {
    let (whole, part) = text.split_once('.')?;
    if part.len() != 2 {
        return None;
    }
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(part.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_tells_what_its_files_say() {
        let group = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("cpu.stat", "usage_usec 7\nuser_usec 5\n"),
            ("memory.events", "oom_kill 2\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.swap.current", "1\n"),
            ("pids.current", "3\n"),
            ("pids.events", "max 9\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3\n8:16 \nx\n"),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.07 avg300=100.00 total=42\nfull avg10=x total=7\n",
            ),
        ] {
            fs::write(group.path().join(file), text).unwrap();
        }
        let stats = read(group.path());
        assert!(stats.at_ns > 0);
        assert_eq!((stats.cpu["usage_usec"], stats.cpu["user_usec"]), (7, 5));
        assert_eq!(stats.memory_events["oom_kill"], 2);
        assert_eq!(stats.memory_use["max"], u64::MAX);
        assert_eq!((stats.memory_use["current"], stats.memory_use["swap.current"]), (4096, 1));
        assert!(!stats.memory_use.contains_key("peak") && stats.memory.is_empty());
        assert_eq!((stats.pids["current"], stats.pids["events.max"]), (3, 9));
        assert!(!stats.pids.contains_key("max"));
        assert_eq!(stats.io.len(), 2);
        assert_eq!((stats.io[0].major, stats.io[0].counts["wbytes"]), (254, 2));
        let cpu = &stats.pressure["cpu"];
        assert_eq!((cpu.some.avg10, cpu.some.avg60, cpu.some.avg300), (150, 7, 10_000));
        assert_eq!((cpu.full.avg10, cpu.full.total), (0, 7));
        assert!(!stats.pressure.contains_key("io"));
    }
}
