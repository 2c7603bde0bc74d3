//! Tests that hosts take from one queue, one at a time, and what each of them cost. It knows neither
//! hosts nor tests: a command for each test comes from its caller.

use std::io;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::test::{SKIPPED, Tally};

/// So many of the tests that took longest are told.
const SLOWEST: usize = 10;

/// What one test took.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    took: Duration,
    name: String,
}

/// Runs each test of `names` by the command that `command` makes of it, so many at a time as there are
/// hosts, and tells which took longest. A test's output is told if it failed or can't run here.
///
/// # Errors
///
/// Fails if a command can't be made or started.
pub(crate) fn run(
    names: &[String],
    hosts: usize,
    command: impl Fn(usize, &str) -> Result<Command> + Sync,
    tell: impl Fn(&str) -> io::Result<()> + Sync,
) -> Result<Tally> {
    let next = AtomicUsize::new(0);
    let of_host = |host| -> Result<(Tally, Vec<Cost>)> {
        let (mut tally, mut costs) = (Tally::default(), Vec::new());
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            let begun = Instant::now();
            let output = command(host, name)?.output().context("cannot start a test")?;
            let took = begun.elapsed();
            let text = String::from_utf8_lossy(&output.stdout);
            let one = Tally::of(&text, output.status.success());
            let said = if one.is_good() { skips(&text) } else { whole(&text, &output.stderr) };
            let (end, seconds) = (one.word(), took.as_secs_f64());
            let line = format!("test {name} ... {end} ({seconds:.0} s)\n{said}");
            tell(line.trim_end())?;
            tally = tally.and(&one);
            costs.push(Cost { took, name: name.clone() });
        }
        Ok((tally, costs))
    };
    let (mut tally, mut costs) = (Tally::default(), Vec::new());
    thread::scope(|scope| -> Result<()> {
        let of_host = &of_host;
        let running: Vec<_> = (0..hosts).map(|host| scope.spawn(move || of_host(host))).collect();
        for host in running {
            let (its, took) = host.join().expect("a queue does not panic")?;
            tally = tally.and(&its);
            costs.extend(took);
        }
        Ok(())
    })?;
    tell(&format!("the slowest:\n{}", slowest(costs)))?;
    Ok(tally)
}

/// The lines by which a test says that it can't run here.
fn skips(text: &str) -> String {
    let lines = text.lines().filter(|line| line.starts_with(SKIPPED));
    lines.map(|line| format!("{line}\n")).collect()
}

/// All that a test and its host said.
fn whole(text: &str, errors: &[u8]) -> String {
    format!("{text}{}", String::from_utf8_lossy(errors))
}

/// The tests that took longest, a line each.
fn slowest(mut costs: Vec<Cost>) -> String {
    costs.sort_by(|a, b| b.cmp(a));
    let lines = costs.iter().take(SLOWEST);
    lines.map(|cost| format!("{:4.0} s {}\n", cost.took.as_secs_f64(), cost.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn says(text: &str, code: i32) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("echo '{text}'; exit {code}")]);
        command
    }

    #[test]
    fn every_test_is_run_once_by_one_of_the_hosts_and_counted() {
        let names: Vec<_> = (0..7).map(|number| format!("test-{number}")).collect();
        let command = |_host, name: &str| {
            Ok(match name {
                "test-3" => says("test result: FAILED. 0 passed; 1 failed; 0 ignored", 101),
                // It ends without a word of its result.
                "test-4" => says("", 1),
                "test-5" => says("SKIPPED: no disk\ntest result: ok. 1 passed; 0 failed", 0),
                _ => says("test result: ok. 1 passed; 0 failed; 0 ignored", 0),
            })
        };
        let told = Mutex::new(String::new());
        let tally = run(&names, 2, command, |text| {
            told.lock().unwrap().push_str(&format!("{text}\n"));
            Ok(())
        });
        assert_eq!(tally.unwrap().to_string(), "4 passed, 2 failed, 1 skipped");
        let told = told.into_inner().unwrap();
        for name in names {
            assert_eq!(told.matches(&format!("test {name} ... ")).count(), 1, "{told}");
        }
        assert!(told.contains("test test-3 ... FAILED ("), "{told}");
        assert!(told.contains(" s)\ntest result: FAILED."), "{told}");
        assert!(told.contains("test test-5 ... skipped ("), "{told}");
        assert!(told.contains(" s)\nSKIPPED: no disk\nt"), "{told}");
    }

    #[test]
    fn the_slowest_come_first() {
        let costs = [3, 40, 7].map(|seconds| Cost {
            took: Duration::from_secs(seconds),
            name: format!("t{seconds}"),
        });
        assert_eq!(slowest(costs.into()), "  40 s t40\n   7 s t7\n   3 s t3\n");
    }
}
