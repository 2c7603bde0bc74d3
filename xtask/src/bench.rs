//! `cargo xtask bench`: figures that a command prints, so that anybody can have their own.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand, ValueEnum};

use crate::cache::Cache;
use crate::host::Host;
use crate::host::probe::{KvmClass, probe};
use crate::packages::machine;
use crate::programs::Programs;
use crate::report::say;
use crate::test::{build_bare_guest, cargo};
use crate::test_linux::{host_command, qemu};

/// The program that measures restarts, of the package of the tests.
const RESTART: &str = "bench-restart";
/// The program that measures hotplug.
const HOTPLUG: &str = "bench-hotplug";

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
    /// Brings a processor, memory, a disk and a nic to a running Linux guest and takes them away again,
    /// with this VMM and with QEMU in turns, and prints how long each took until the guest saw it
    Hotplug(HotplugArguments),
}

#[derive(Debug, Args)]
struct HotplugArguments {
    /// How often each comes and goes with each of the two
    #[arg(long, value_name = "N", default_value_t = 10,
        value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
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
            Bench::Hotplug(arguments) => arguments.run(root),
        }
    }
}

/// Builds one of the programs that measure; gives its path.
fn build(root: &Path, programs: &Programs, name: &str) -> Result<PathBuf> {
    let built = cargo(root).args(["build", "--quiet", "--locked", "--bin", name]).status();
    ensure!(built.context("cargo")?.success(), "{name} does not build");
    Ok(programs.folder.join(name))
}

/// Runs it; its own exit code says whether all was measured.
fn measure(mut command: Command, name: &str) -> Result<ExitCode> {
    let status = command.status().with_context(|| format!("cannot start {name}"))?;
    if !status.success() {
        say(&format!("{name} ended with {status}"));
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl HotplugArguments {
    /// Linux guests need full KVM; where there is none, both VMMs run on the emulated host.
    fn run(&self, root: &Path) -> Result<ExitCode> {
        let packages = [machine::BUILD_PACKAGES, machine::TEST_PACKAGES].concat();
        machine::need_root(&[packages.as_slice(), machine::TREE_PACKAGES].concat())?;
        machine::need(&packages)?;
        let cache = Cache::open()?;
        let programs = Programs::build()?;
        let program = build(root, &programs, HOTPLUG)?;
        let host = match Host::is_direct()? {
            true => KvmClass::Full.to_string(),
            false => "emulated KVM host (each guest is nested in emulation)".to_owned(),
        };
        let mut command = host_command(&cache, &programs)?;
        command.arg("--env").arg(format!("NACRE_QEMU={}", qemu(&cache)?));
        command.arg("--env").arg(format!("NACRE_BENCH_HOST={host}"));
        command.arg("--").arg(program).args(["--rounds", &self.rounds.to_string()]);
        measure(command, HOTPLUG)
    }
}

impl RestartArguments {
    fn run(&self, root: &Path) -> Result<ExitCode> {
        machine::need(&[machine::BUILD_PACKAGES, machine::TEST_PACKAGES].concat())?;
        let programs = Programs::build()?;
        build_bare_guest(root)?;
        let program = build(root, &programs, RESTART)?;
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
        command.args(devices.iter().map(|device| device.name()));
        measure(command, RESTART)
    }
}
