//! `cargo xtask bench`: figures that a command prints, so that anybody can have their own.

use std::env;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand, ValueEnum};

use crate::host::probe::{KvmClass, probe};
use crate::packages::machine;
use crate::programs::Programs;
use crate::report::say;
use crate::test::{build_bare_guest, cargo};

/// The program that measures restarts, of the package of the tests.
const RESTART: &str = "bench-restart";

/// What `cargo xtask bench` takes.
#[derive(Debug, Args)]
pub struct BenchArguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Kills each device's backend under load, and prints how long the guest saw nothing of it and
    /// what was lost, repeated or failed
    Restart(RestartArguments),
}

#[derive(Debug, Args)]
struct RestartArguments {
    /// The devices; all if none is named
    #[arg(value_enum)]
    devices: Vec<Device>,
    /// How often each is killed
    #[arg(long, value_name = "N", default_value_t = 200,
        value_parser = clap::value_parser!(u32).range(1..))]
    kills: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    Blk,
    Net,
    Fs,
    Vsock,
}

impl Device {
    fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Fs => "fs",
            Self::Vsock => "vsock",
        }
    }
}

impl BenchArguments {
    /// Builds what is measured, and measures it: on this machine, or on the emulated host if there
    /// is no /dev/kvm here.
    ///
    /// # Errors
    ///
    /// Fails if something is missing or does not build. The exit code tells the rest.
    pub fn run(&self, root: &Path) -> Result<ExitCode> {
        match &self.bench {
            Bench::Restart(arguments) => arguments.run(root),
        }
    }
}

impl RestartArguments {
    fn run(&self, root: &Path) -> Result<ExitCode> {
        machine::need(&[machine::BUILD_PACKAGES, machine::TEST_PACKAGES].concat())?;
        let programs = Programs::build()?;
        build_bare_guest(root)?;
        let built = cargo(root).args(["build", "--quiet", "--locked", "--bin", RESTART]).status();
        ensure!(built.context("cargo")?.success(), "{RESTART} does not build");
        let program = programs.folder.join(RESTART);
        let class = probe();
        let host = match class {
            KvmClass::Full | KvmClass::Emulating { .. } => class.to_string(),
            _ => "emulated KVM host".to_owned(),
        };
        let variables =
            [("NACRE_BIN_DIR", programs.folder.display().to_string()), ("NACRE_BENCH_HOST", host)];
        let mut command = match class {
            KvmClass::Full | KvmClass::Emulating { .. } => {
                let mut command = Command::new(program);
                command.envs(variables);
                command
            }
            _ => {
                // This same program boots a host that has a /dev/kvm.
                let mut command = Command::new(env::current_exe().context("my own program")?);
                command.arg("host");
                for (name, value) in variables {
                    command.arg("--env").arg(format!("{name}={value}"));
                }
                command.arg("--").arg(program);
                command
            }
        };
        let devices = match self.devices.as_slice() {
            [] => Device::value_variants(),
            some => some,
        };
        command.arg("--kills").arg(self.kills.to_string());
        let status = command.args(devices.iter().map(|device| device.name())).status();
        let status = status.with_context(|| format!("cannot start {RESTART}"))?;
        if !status.success() {
            say(&format!("{RESTART} ended with {status}"));
        }
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
