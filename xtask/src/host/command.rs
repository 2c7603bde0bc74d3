//! `cargo xtask host`: a command on the KVM host, or the emulated host itself up and down.

use super::machine::Parts;
use super::server::{Clients, serve};
use super::session::job;
use super::{Emulated, Host};
use crate::cache::Cache;
use crate::report::say;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use rustix::termios::isatty;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// The hidden task that owns an emulated host.
pub const SERVE_TASK: &str = "host-serve";

const IDLE_MAX_S: u64 = 30 * 60;
/// How long a kept host may be idle, unless something else is asked for.
pub const IDLE_MAX: Duration = Duration::from_secs(IDLE_MAX_S);

/// Arguments of `cargo xtask host`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask host -- uname -a
  cargo xtask host -- ./target/debug/nacre-vmm --help
  cargo xtask host up      # keep one emulated host up: later commands start at once
  cargo xtask host down

The clone, the current folder and absolute paths among the arguments are at the same place in the
emulated host; everything else of this machine is beneath /host there. Output, exit code (128+n
for signal n), terminal and signals pass through. NACRE_HOST=direct or emulated overrides the
probe of /dev/kvm; NACRE_CACHE moves the cache folder. A host that is kept up ends after half an hour
in which nothing ran in it, a detached sandbox included. NACRE_HOST_NAME names a kept host of one's
own: commands with that variable use it, and no others do.")]
pub struct HostArguments {
    #[command(subcommand)]
    action: Option<Action>,
    /// Keep the emulated host up afterwards
    #[arg(long)]
    keep: bool,
    /// Another path of this machine that must be at the same place in the host
    #[arg(long = "bind", value_name = "PATH")]
    binds: Vec<PathBuf>,
    /// A variable for the command
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The command
    #[arg(last = true, value_name = "COMMAND")]
    argv: Vec<String>,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Action {
    /// Boot the emulated host and leave it up
    Up {
        /// Take it down when nothing has run in it for so long
        #[arg(long, value_name = "SECONDS", default_value_t = IDLE_MAX_S)]
        idle: u64,
    },
    /// Take it down
    Down,
    /// Say what the probe found
    Probe,
}

/// Arguments of the hidden task that owns an emulated host.
#[derive(Debug, Args)]
pub struct ServeArguments {
    #[arg(long)]
    client: Option<i32>,
    #[arg(long)]
    listener: Option<i32>,
    #[arg(long, default_value_t = IDLE_MAX_S)]
    idle: u64,
    #[arg(long)]
    log: PathBuf,
}

impl HostArguments {
    /// Does what the arguments say.
    ///
    /// # Errors
    /// The host cannot be used.
    pub fn run(self) -> Result<ExitCode> {
        let cache = Cache::open()?;
        match self.action {
            Some(Action::Up { idle }) => {
                let idle_max = Duration::from_secs(idle);
                let boot_ms = Emulated::prepare(&cache)?.up(idle_max)?;
                say(&format!("the emulated host is up (booted in {boot_ms} ms)"));
            }
            Some(Action::Down) => {
                let was_up = Emulated::prepare(&cache)?.down()?;
                say(if was_up { "the emulated host is down" } else { "no emulated host was up" });
            }
            Some(Action::Probe) => say(&super::probe::probe().to_string()),
            None if self.argv.is_empty() => bail!("no command; see cargo xtask host --help"),
            None => return self.run_command(&cache),
        }
        Ok(ExitCode::SUCCESS)
    }

    fn run_command(self, cache: &Cache) -> Result<ExitCode> {
        let host = Host::choose(cache)?;
        say(&host.describe());
        let mut env = Vec::new();
        for pair in &self.env {
            let (name, value) = pair.split_once('=').context("--env wants NAME=VALUE")?;
            env.push((name.to_owned(), value.to_owned()));
        }
        let Host::Emulated(emulated, _) = host else {
            let (program, arguments) = self.argv.split_first().context("no command")?;
            let error = Command::new(program).args(arguments).envs(env).exec();
            return Err(error).with_context(|| format!("cannot run {program}"));
        };
        if self.keep {
            emulated.up(IDLE_MAX)?;
        }
        let mut spec = job(&self.argv, &self.binds)?;
        spec.env.extend(env);
        let terminal = isatty(rustix::stdio::stdin()) && isatty(rustix::stdio::stdout());
        let ending = emulated.session()?.run(spec, terminal, true)?;
        Ok(ExitCode::from(ending.code()))
    }
}

impl ServeArguments {
    /// Owns an emulated host until it is no longer wanted.
    ///
    /// # Errors
    /// The host does not come up, or stops by itself.
    pub fn run(self) -> Result<ExitCode> {
        let cache = Cache::open()?;
        let parts = Parts::prepare(&cache)?;
        let clients = match (self.client, self.listener) {
            (Some(number), None) => Clients::One(inherited(number)?.into()),
            (None, Some(number)) => Clients::Many {
                listener: inherited(number)?.into(),
                idle_max: Duration::from_secs(self.idle),
            },
            _ => bail!("either a client or a listener"),
        };
        serve(&parts, clients, &self.log)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn inherited(number: i32) -> Result<OwnedFd> {
    crate::sys::inherited(number).with_context(|| format!("no file was inherited as {number}"))
}
