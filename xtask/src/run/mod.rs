//! `cargo xtask run`: builds everything, prepares the guest, and runs `nacre` on the KVM host.
//!
//! `cargo xtask nacre` does the same for the other commands of `nacre`.

mod arguments;

use crate::cache::{CACHE_VARIABLE, Cache};
use crate::guest_image::{GuestImage, busybox_rootfs};
use crate::host::command::IDLE_MAX;
use crate::host::places::place;
use crate::host::{Emulated, Host, job};
use crate::packages::machine;
use crate::programs::Programs;
use crate::report::say;
use anyhow::{Context, Result};
use arguments::{Mapping, map_other, map_run};
use clap::Args;
use rustix::termios::isatty;
use std::env;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// As `nacre run` ends when it fails before the container runs.
pub const SETUP_FAILED: u8 = 125;

/// Arguments of `cargo xtask run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Everything is passed to `nacre run`; without --rootfs and --image the container's root file system
is one of busybox. Paths may be relative. Examples:
  cargo xtask run -- echo hello
  cargo xtask run -it -- sh
  cargo xtask run --cpus 2 --memory 1G --net -v ./data:/data:ro -e A=1 -- ls /data
  cargo xtask run --name web --detach -- httpd -f     # keeps an emulated host up
  cargo xtask nacre -- exec web ps
  cargo xtask nacre -- run --help                     # all options")]
pub struct RunArguments {
    /// Options of `nacre run`, then the command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS -- COMMAND")]
    argv: Vec<String>,
}

/// Arguments of `cargo xtask nacre`.
#[derive(Debug, Args)]
pub struct NacreArguments {
    /// A command of `nacre` and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    argv: Vec<String>,
}

/// What stands before the command line of `nacre`, whatever the host.
struct Prepared {
    nacre: String,
    env: Vec<(String, String)>,
    /// What must be reachable in the host.
    paths: Vec<PathBuf>,
}

impl RunArguments {
    /// Runs `nacre run`.
    ///
    /// # Errors
    /// Something cannot be built or prepared, or the host cannot be used.
    pub fn run(self) -> Result<ExitCode> {
        let argv = [vec!["run".to_owned()], self.argv].concat();
        NacreArguments { argv }.run()
    }
}

impl NacreArguments {
    /// Runs `nacre` with these arguments.
    ///
    /// # Errors
    /// Something cannot be built or prepared, or the host cannot be used.
    pub fn run(self) -> Result<ExitCode> {
        let direct = Host::is_direct()?;
        let names = if direct { Path::to_path_buf } else { inside };
        let mapping = match self.argv.split_first() {
            Some((command, rest)) if command == "run" => {
                Some(map_run(rest, names, |name| env::var(name).ok())?)
            }
            _ => None,
        };
        // What this machine or its user lacks is said before anything is built.
        let network = direct && mapping.as_ref().is_some_and(|mapping| mapping.network);
        machine::need_root(&packages(direct, network))?;
        if network {
            machine::need(machine::NETWORK_PACKAGES)?;
        }
        let cache = Cache::open()?;
        let (prepared, mapping) = match mapping {
            Some(mapping) => prepare_run(&cache, mapping, names)?,
            None => prepare_other(self.argv, names)?,
        };
        let host = Host::choose(&cache)?;
        say(&host.describe());
        match host {
            Host::Direct => {
                let mut command = Command::new(&prepared.nacre);
                let error = command.args(&mapping.arguments).envs(prepared.env).exec();
                Err(error).with_context(|| format!("cannot run {}", prepared.nacre))
            }
            Host::Emulated(emulated, _) => run_emulated(&emulated, prepared, mapping),
        }
    }
}

/// All that a run may install.
fn packages(direct: bool, network: bool) -> Vec<&'static str> {
    let host = if direct { &[] } else { machine::TREE_PACKAGES };
    let network = if network { machine::NETWORK_PACKAGES } else { &[] };
    [machine::BUILD_PACKAGES, host, network].concat()
}

/// How the emulated host calls a path of this machine.
fn inside(path: &Path) -> PathBuf {
    place(path).inside
}

fn prepare_run(
    cache: &Cache,
    mut mapping: Mapping,
    names: fn(&Path) -> PathBuf,
) -> Result<(Prepared, Mapping)> {
    let programs = Programs::build()?;
    let guest = GuestImage::prepare(cache, &programs.agent)?;
    if !mapping.has_root {
        let rootfs = busybox_rootfs(cache)?;
        mapping.arguments.insert(0, "--rootfs".to_owned());
        mapping.arguments.insert(1, text(&names(&rootfs))?);
        mapping.paths.push(rootfs);
    }
    mapping.arguments.insert(0, "run".to_owned());
    let env = vec![
        ("NACRE_KERNEL".to_owned(), text(&names(&guest.kernel))?),
        ("NACRE_INITRAMFS".to_owned(), text(&names(&guest.initramfs))?),
        // Images are unpacked there once, also where the host itself does not last.
        (CACHE_VARIABLE.to_owned(), text(&names(cache.root()))?),
    ];
    let nacre = names(&programs.folder.join("nacre"));
    let paths = vec![programs.folder, cache.root().to_owned()];
    Ok((Prepared { nacre: text(&nacre)?, env, paths }, mapping))
}

/// Commands about sandboxes that exist need nothing built: those run from programs that are.
fn prepare_other(
    arguments: Vec<String>,
    names: fn(&Path) -> PathBuf,
) -> Result<(Prepared, Mapping)> {
    let folder = Programs::folder()?;
    let nacre = folder.join("nacre");
    if !nacre.exists() {
        Programs::build()?;
    }
    let mapping = map_other(arguments);
    Ok((Prepared { nacre: text(&names(&nacre))?, env: Vec::new(), paths: vec![folder] }, mapping))
}

fn run_emulated(emulated: &Emulated, prepared: Prepared, mapping: Mapping) -> Result<ExitCode> {
    if mapping.detached {
        emulated.up(IDLE_MAX)?;
    }
    let argv = [vec![prepared.nacre], mapping.arguments].concat();
    let mut spec = job(&argv, &[prepared.paths, mapping.paths].concat())?;
    spec.env.extend(prepared.env);
    let terminal = mapping.terminal && isatty(rustix::stdio::stdin());
    // A terminal's keys are input too. Without either, our input is somebody else's.
    let input = terminal || mapping.interactive;
    let ending = emulated.session()?.run(spec, terminal, input)?;
    Ok(ExitCode::from(ending.code()))
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not text", path.display()))
}
