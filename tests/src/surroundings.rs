//! What a bench's figures are worth nothing without: when and on what they were taken.

use std::env;
use std::fs;
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::Result;
use rustix::system::uname;

/// One line: date, processors, kernel, what `NACRE_BENCH_HOST` says of the host, and its load.
///
/// # Errors
///
/// Fails if there is no `date`.
pub fn line() -> Result<String> {
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output()?.stdout;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    Ok(format!(
        "{}, {} cores ({}), Linux {}, {}, load {}",
        String::from_utf8_lossy(&date).trim(),
        available_parallelism()?,
        processor.unwrap_or("unknown").trim_start_matches([' ', '\t', ':']),
        uname().release().to_string_lossy(),
        env::var("NACRE_BENCH_HOST").unwrap_or_default(),
        load.split(' ').next().unwrap_or("unknown")
    ))
}
