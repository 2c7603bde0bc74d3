//! `cargo xtask table`: what is written down in `docs` is made by a command, so that anybody can
//! make it again.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::cache::Cache;
use crate::packages::machine;
use crate::programs::Programs;
use crate::test::cargo;
use crate::test_linux::host_command;

/// The program that asks, of the package of the tests.
const PROGRAM: &str = "containerd-table";
const FILE: &str = "docs/containerd.md";

/// What `cargo xtask table` takes.
#[derive(Debug, Args)]
pub struct TableArguments {
    #[arg(value_enum)]
    table: Table,
    /// The runtimes, the reference first; all if none is named
    #[arg(long = "runtime", value_enum)]
    runtimes: Vec<Runtime>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Table {
    /// The answers of runtimes to the same command lines
    Containerd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Runtime {
    Runc,
    Nacre,
}

impl Runtime {
    fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Nacre => "nacre",
        }
    }
}

impl TableArguments {
    /// Builds what is asked, asks it on the KVM host, and writes the table.
    ///
    /// # Errors
    ///
    /// Fails if something is missing or does not build. The exit code tells the rest.
    pub fn run(&self, root: &Path) -> Result<ExitCode> {
        let Table::Containerd = self.table;
        machine::need(&[machine::BUILD_PACKAGES, machine::TEST_PACKAGES].concat())?;
        let programs = Programs::build()?;
        let built = cargo(root).args(["build", "--quiet", "--locked", "--bin", PROGRAM]).status();
        ensure!(built.context("cargo")?.success(), "{PROGRAM} does not build");
        let mut command = host_command(&Cache::open()?, &programs)?;
        command.arg("--").arg(programs.folder.join(PROGRAM)).arg(root.join(FILE));
        let runtimes = match self.runtimes.as_slice() {
            [] => Runtime::value_variants(),
            some => some,
        };
        let status = command.args(runtimes.iter().map(|runtime| runtime.name())).status();
        let passed = status.with_context(|| format!("cannot start {PROGRAM}"))?.success();
        Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
