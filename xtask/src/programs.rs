//! Builds the programs of a sandbox: those of the host, and the agent for its guest.

use crate::packages::machine;
use crate::report::say;
use crate::tool::output;
use anyhow::{Context, Result, bail};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const HOST_PROGRAMS: &[&str] = &[
    "nacre-vmm",
    "nacre-blk",
    "nacre-net",
    "nacre-fs",
    "nacre-vsock",
    "nacre",
    "containerd-shim-nacre-v2",
];
const AGENT_PACKAGE: &str = "nacre-agent";
const AGENT_TARGET: &str = "x86_64-unknown-linux-musl";

/// Where the built programs are.
#[derive(Debug)]
pub struct Programs {
    /// The folder of `nacre`, `nacre-vmm` and the backends.
    pub folder: PathBuf,
    /// The agent, a static program.
    pub agent: PathBuf,
}

impl Programs {
    /// Builds all of them.
    ///
    /// # Errors
    /// A package or the agent's target is missing and cannot be had, or the build fails.
    pub fn build() -> Result<Self> {
        machine::need(machine::BUILD_PACKAGES)?;
        add_agent_target()?;
        let folder = Self::folder()?;
        let profile = folder.file_name().context("no profile folder")?;
        let target = folder.parent().context("no target folder")?;
        let agent = target.join(AGENT_TARGET).join(profile).join(AGENT_PACKAGE);
        // Not by their packages: a dependency's features follow from what is chosen, and would be
        // others, and it be built once more, than where the whole workspace is.
        let programs = HOST_PROGRAMS.iter().flat_map(|name| ["--bin", name]);
        cargo_build(&programs.collect::<Vec<_>>(), folder.join("nacre").exists())?;
        let arguments = ["--package", AGENT_PACKAGE, "--target", AGENT_TARGET];
        cargo_build(&arguments, agent.exists())?;
        Ok(Self { folder, agent })
    }

    /// Where the host's programs are or will be: cargo puts them beside this one.
    ///
    /// # Errors
    /// The path of this program is unknown.
    pub fn folder() -> Result<PathBuf> {
        let program = env::current_exe().context("cannot find my own program")?;
        Ok(program.parent().context("this program is in no folder")?.to_path_buf())
    }
}

/// The clone that this program was built from.
///
/// # Errors
/// Never for a program that cargo built.
pub fn workspace() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace has no folder")
}

/// Shows cargo's own progress when much is to be built.
fn cargo_build(arguments: &[&str], quiet: bool) -> Result<()> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.arg("build").arg("--locked").args(arguments).current_dir(workspace()?);
    if quiet {
        command.arg("--quiet");
    } else {
        say("building (some minutes the first time)");
    }
    // Cargo's messages go to standard error, where ours go as well.
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the build failed: cargo ended with {status}");
    }
    Ok(())
}

fn add_agent_target() -> Result<()> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    if Path::new(sysroot.trim()).join("lib/rustlib").join(AGENT_TARGET).exists() {
        return Ok(());
    }
    say(&format!("adding Rust's target {AGENT_TARGET}"));
    output(Command::new("rustup").args(["target", "add", AGENT_TARGET]))
        .with_context(|| format!("cannot add Rust's target {AGENT_TARGET}"))?;
    Ok(())
}
