//! `nacre ps`: what sandboxes there are.

use std::{
    io::{self, Write},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use shim::{
    paths,
    record::Record,
    registry::{Life, Registry},
    size::ByteSize,
};

use crate::{args::Ps, failure::Failure};

/// The longest command that the table shows, in characters.
const COMMAND_CHARS: usize = 40;

pub(crate) fn ps(args: &Ps) -> Result<u8, Failure> {
    let records = Registry::open(paths::state_root())?.list()?;
    let text = if args.json {
        let list: Vec<Value> = records.iter().map(object).collect();
        format!("{:#}\n", Value::from(list))
    } else {
        table(&records, SystemTime::now())
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Failure::setup("standard output", error))?;
    Ok(0)
}

fn status(record: &Record) -> &'static str {
    match Life::of(record) {
        Life::Creating => "creating",
        Life::Running => "running",
        Life::Exited(_) => "exited",
        Life::Dead => "dead",
    }
}

fn object(record: &Record) -> Value {
    let code = match Life::of(record) {
        Life::Exited(code) => Some(code),
        Life::Creating | Life::Running | Life::Dead => None,
    };
    json!({
        "name": record.name,
        "status": status(record),
        "exit_code": code,
        "supervisor_pid": record.supervisor.pid,
        "created_s": record.created_s,
        "cpus": record.cpus,
        "memory_bytes": record.memory_bytes,
        "max_cpus": record.max_cpus,
        "max_memory_bytes": record.max_memory_bytes,
        "address": record.network.as_ref().map(|network| network.guest),
        "command": record.command,
    })
}

fn table(records: &[Record], now: SystemTime) -> String {
    let title = ["NAME", "STATUS", "AGE", "CPUS", "MEMORY", "COMMAND"].map(str::to_owned);
    let rows = records.iter().map(|record| row(record, now));
    let rows: Vec<[String; 6]> = [title].into_iter().chain(rows).collect();
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row(record: &Record, now: SystemTime) -> [String; 6] {
    let created = UNIX_EPOCH + Duration::from_secs(record.created_s);
    let status = match Life::of(record) {
        Life::Exited(code) => format!("exited {code}"),
        Life::Creating | Life::Running | Life::Dead => status(record).to_owned(),
    };
    let command: String = record
        .command
        .join(" ")
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .take(COMMAND_CHARS)
        .collect();
    [
        record.name.to_string(),
        status,
        age(now.duration_since(created).unwrap_or_default()),
        record.cpus.to_string(),
        ByteSize(record.memory_bytes).to_string(),
        command,
    ]
}

fn age(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..=99 => format!("{seconds}s"),
        seconds @ 100..=5_999 => format!("{}m", seconds / 60),
        seconds @ 6_000..=172_799 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_one_unit() {
        for (seconds, text) in [(5, "5s"), (150, "2m"), (7_200, "2h"), (200_000, "2d")] {
            assert_eq!(age(Duration::from_secs(seconds)), text);
        }
    }
}
