//! `cargo xtask`: arguments to a command, its error chain and its exit code.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use xtask::bench::BenchArguments;
use xtask::cache::Cache;
use xtask::executor;
use xtask::fuzz::FuzzArguments;
use xtask::host::command::{HostArguments, SERVE_TASK, ServeArguments};
use xtask::packages::containerd;
use xtask::packages::kernel::Kernel;
use xtask::packages::machine;
use xtask::packages::tree::Tree;
use xtask::programs::workspace;
use xtask::report::say;
use xtask::run::{NacreArguments, RunArguments, SETUP_FAILED};
use xtask::soak::SoakArguments;
use xtask::table::TableArguments;
use xtask::test::{self, TestArguments};
use xtask::tidy;

#[derive(Debug, Parser)]
#[command(name = "xtask", about = "Nacre's development tasks")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Fetches and makes all that comes from Debian packages, ahead of its first use
    Packages,
    /// Runs a command on the KVM host, which is this machine or an emulated one
    Host(HostArguments),
    /// Runs a container in a sandbox
    Run(RunArguments),
    /// Runs another command of nacre: ps, exec, logs, stop, rm
    Nacre(NacreArguments),
    /// Runs the tests, layer by layer; see README.md
    Test(TestArguments),
    /// Storms of boots, kills and failures, for as long as asked; see CONTRIBUTING.md
    Soak(SoakArguments),
    /// Measures, and prints figures
    Bench(BenchArguments),
    /// Makes a table of docs/ again
    Table(TableArguments),
    /// New random inputs for what reads untrusted bytes, for as long as asked; see CONTRIBUTING.md
    Fuzz(FuzzArguments),
    /// Checks what lints cannot: crate graph, licences, file heads, names, unsafe's places
    Tidy,
    /// Installs the Debian packages that building the workspace needs
    Setup,
    #[command(name = SERVE_TASK, hide = true)]
    HostServe(ServeArguments),
    #[command(name = executor::TASK, hide = true)]
    InHost,
}

fn main() -> ExitCode {
    let task = Arguments::parse().task;
    let failure = match task {
        Task::Run(_) | Task::Nacre(_) => ExitCode::from(SETUP_FAILED),
        _ => ExitCode::FAILURE,
    };
    match run(task) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error:#}"));
            failure
        }
    }
}

fn run(task: Task) -> anyhow::Result<ExitCode> {
    match task {
        Task::Packages => {
            let cache = Cache::open()?;
            let kernel = Kernel::prepare(&cache)?;
            let tree = Tree::prepare(&cache, &kernel)?;
            containerd::prepare(&cache)?;
            say(&format!("kernel {} and {}", kernel.release(), tree.image().display()));
            Ok(ExitCode::SUCCESS)
        }
        Task::Host(arguments) => arguments.run(),
        Task::Run(arguments) => arguments.run(),
        Task::Nacre(arguments) => arguments.run(),
        Task::Test(arguments) => {
            let passed = test::run(workspace()?, &arguments)?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Soak(arguments) => arguments.run(),
        Task::Bench(arguments) => arguments.run(workspace()?),
        Task::Table(arguments) => arguments.run(workspace()?),
        Task::Fuzz(arguments) => {
            Ok(if arguments.run()? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Tidy => tidy::run(workspace()?).map(|()| ExitCode::SUCCESS),
        Task::Setup => machine::need(machine::BUILD_PACKAGES).map(|()| ExitCode::SUCCESS),
        Task::HostServe(arguments) => arguments.run(),
        Task::InHost => executor::run().map(|()| ExitCode::SUCCESS),
    }
}
