//! `cargo xtask soak`: storms on the KVM host, longer than a test may take.

use std::process::{Command, ExitCode};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::cache::Cache;
use crate::packages::machine;
use crate::programs::{Programs, workspace};
use crate::report::say;
use crate::test::cargo;
use crate::test_linux::host_command;

/// Arguments of `cargo xtask soak`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each round boots sandboxes in a row, or kills (SIGKILL) a process of a sandbox at some moment, or makes
creating one fail at some step, or has fio write and verify a disk; then it looks for what is left
behind. A line for each round and one for all go to standard output; the exit code is 1 if a round
failed. What a round does follows from the seed and the round's number:
  cargo xtask soak 60
  cargo xtask soak --seed 7 --first 12 0     # round 12 of seed 7 alone")]
pub struct SoakArguments {
    /// Minutes after which no round is started any more; the first one always is
    #[arg(default_value_t = 10)]
    minutes: u64,
    /// Decides what the rounds do; a new one each time unless it is given
    #[arg(long)]
    seed: Option<u64>,
    /// The number of the first round
    #[arg(long, value_name = "ROUND", default_value_t = 0)]
    first: u64,
}

impl SoakArguments {
    /// Builds everything and lets the rounds run.
    ///
    /// # Errors
    /// Something cannot be built or prepared, or the host cannot be used.
    pub fn run(self) -> Result<ExitCode> {
        let packages = [machine::BUILD_PACKAGES, machine::TEST_PACKAGES].concat();
        machine::need_root(&[packages.as_slice(), machine::TREE_PACKAGES].concat())?;
        machine::need(&packages)?;
        let cache = Cache::open()?;
        let programs = Programs::build()?;
        let mut build = cargo(workspace()?);
        build.args(["build", "--quiet", "--locked", "--bin", "soak"]);
        ensure!(build.status().context("cannot start cargo")?.success(), "soak does not build");
        let seed = self.seed.map_or_else(new_seed, Ok)?;
        say(&format!("soak: {} minutes, seed {seed}", self.minutes));
        let mut command: Command = host_command(&cache, &programs)?;
        command.arg("--").arg(programs.folder.join("soak"));
        command.args([self.minutes * 60, seed, self.first].map(|number| number.to_string()));
        let status = command.status().context("cannot start the rounds")?;
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn new_seed() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("a clock before 1970")?;
    Ok(now.as_secs())
}
