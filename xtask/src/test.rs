//! `cargo xtask test`: the layers of tests, each where it can run, and one closing line for all.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::packages::machine;
use crate::report::{result, say};
use crate::{test_bare, test_command, test_linux};

/// How a line begins by which a test says that it can't run here.
pub(crate) const SKIPPED: &str = "SKIPPED: ";

/// A layer of tests, by what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Layer {
    /// Unit and wire tests: no KVM.
    Unit,
    /// The VMM and real backends with a guest that has no kernel: any /dev/kvm.
    Bare,
    /// `cargo xtask run` as a user types it: full KVM, or the emulated host.
    Command,
    /// Real Linux guests: full KVM, or the emulated host.
    Linux,
    /// Our backends under QEMU, and our VMM with others' backends.
    Interop,
}

/// What the tests of one run came to.
#[derive(Debug, Default)]
pub struct Tally {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Tally {
    /// What two runs came to.
    pub(crate) fn and(&self, other: &Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }

    /// What one run came to, by its output and whether it ended well. One that failed without a failed
    /// test counts as one failure.
    pub(crate) fn of(output: &str, is_success: bool) -> Self {
        let mut tally = Self::default();
        for line in output.lines() {
            tally.read(line);
        }
        for _skip in output.lines().filter(|line| line.starts_with(SKIPPED)) {
            tally.skip();
        }
        tally.failed += u32::from(!is_success && tally.failed == 0);
        tally
    }

    /// Whether nothing failed.
    pub(crate) fn is_good(&self) -> bool {
        self.failed == 0
    }

    /// How one test ended.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self { failed: 1.., .. } => "FAILED",
            Self { passed: 1.., .. } => "ok",
            Self { .. } => "skipped",
        }
    }

    /// A test that can't run here says so in one line and passes for the test program.
    fn skip(&mut self) {
        self.skipped += 1;
        self.passed = self.passed.saturating_sub(1);
    }

    /// Takes over the counts of a test program's closing line, if `line` is one.
    fn read(&mut self, line: &str) {
        let Some(rest) = line.trim().strip_prefix("test result: ") else { return };
        let count = |what: &str| {
            let words: Vec<_> =
                rest.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
            let at = words.iter().position(|word| *word == what)?;
            words.get(at.checked_sub(1)?)?.parse::<u32>().ok()
        };
        self.passed += count("passed").unwrap_or(0);
        self.failed += count("failed").unwrap_or(0);
        self.skipped += count("ignored").unwrap_or(0);
    }
}

impl Display for Tally {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(out, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// What `cargo xtask test` takes.
#[derive(Debug, Args)]
pub struct TestArguments {
    /// The layers to run; all if none is named
    #[arg(value_enum)]
    layers: Vec<Layer>,
    /// Only tests whose name contains this; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
}

/// Runs the layers.
///
/// # Errors
///
/// Fails if the machine lacks a package. The answer tells whether every layer ran and passed.
pub fn run(root: &Path, arguments: &TestArguments) -> Result<bool> {
    let layers: BTreeSet<_> = match arguments.layers.as_slice() {
        [] => Layer::value_variants().iter().copied().collect(),
        some => some.iter().copied().collect(),
    };
    let packages = [machine::BUILD_PACKAGES, machine::TEST_PACKAGES].concat();
    machine::need_root(&[packages.as_slice(), machine::TREE_PACKAGES].concat())?;
    machine::need(&packages)?;
    let mut all_ran = true;
    let mut tally = Tally::default();
    for layer in layers {
        let start = Instant::now();
        // What can't be prepared or built does not keep the other layers from running.
        if let Err(reason) = run_layer(root, layer, &arguments.only, &mut tally) {
            say(&format!("layer {layer:?}: skipped: {reason:#}"));
            tally.skipped += 1;
            all_ran = false;
        }
        let minutes = start.elapsed().as_secs_f64() / 60.0;
        say(&format!("layer {layer:?}: {minutes:.1} minutes"));
    }
    result(&tally.to_string())?;
    Ok(tally.is_good() && all_ran)
}

/// Runs one layer; the error is the reason why it can't run here.
fn run_layer(root: &Path, layer: Layer, only: &[String], tally: &mut Tally) -> Result<()> {
    match layer {
        Layer::Unit => {
            let mut tests = cargo(root);
            tests.args(["test", "--workspace", "--no-fail-fast", "--", "--show-output"]).args(only);
            count_tests(&mut tests, tally)
        }
        Layer::Bare => test_bare::run(root, only, tally),
        Layer::Command => test_command::run(root, only, tally),
        Layer::Linux => test_linux::run(root, only, tally),
        Layer::Interop => test_linux::interop(root, only, tally),
    }
}

/// Cargo in the tree, with its own colours off.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root).env("CARGO_TERM_COLOR", "never");
    command
}

/// Builds the guest without a kernel, which is no part of the workspace.
///
/// # Errors
///
/// Fails if the build does.
pub(crate) fn build_bare_guest(root: &Path) -> Result<()> {
    let folder = root.join("tests/bare-guest");
    let status =
        Command::new(env!("CARGO")).args(["build", "--quiet"]).current_dir(folder).status();
    ensure!(status.context("cargo")?.success(), "the bare guest does not build");
    Ok(())
}

/// Builds one test program of the `tests` folder without running it; gives its path. Chosen out of
/// the whole workspace, it is built of what that was built of for its other tests.
///
/// # Errors
///
/// Fails if the build does.
pub(crate) fn build_test(root: &Path, name: &str) -> Result<PathBuf> {
    let output = cargo(root)
        .args(["test", "--workspace", "--test", name, "--no-run"])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the {name} tests do not build");
    let text = String::from_utf8(output.stdout)?;
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo built no {name} test"))
}

/// Runs a command that prints what Rust's test programs print; passes the output on and counts.
/// A command that fails without a failed test counts as one failure.
///
/// # Errors
///
/// Fails if it can't be started.
pub(crate) fn count_tests(command: &mut Command, tally: &mut Tally) -> Result<()> {
    let failed_before = tally.failed;
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start the tests")?;
    let output = child.stdout.take().context("the tests' output")?;
    let mut skips = 0;
    // What passing tests said is of interest only where they say that they can't run.
    let mut of_passing_tests = false;
    for line in BufReader::new(output).split(b'\n') {
        let mut line = line?;
        let text = String::from_utf8_lossy(&line).into_owned();
        let is_skip = text.starts_with(SKIPPED);
        skips += u32::from(is_skip);
        of_passing_tests |= text == "successes:";
        of_passing_tests &= !(text == "failures:" || text.starts_with("test result: "));
        if is_skip || !of_passing_tests {
            line.push(b'\n');
            // At once, as another host's tests may be told of beside it.
            std::io::stdout().lock().write_all(&line)?;
        }
        tally.read(&text);
    }
    (0..skips).for_each(|_| tally.skip());
    let status = child.wait()?;
    if !status.success() && tally.failed == failed_before {
        say(&format!("the tests ended with {status}"));
        tally.failed += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_test_programs_are_added_up() {
        let mut tally = Tally::default();
        tally.read("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out");
        tally.read("test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; finished");
        tally.read("running 5 tests");
        assert_eq!((tally.passed, tally.failed, tally.skipped), (14, 3, 1));
    }
}
