//! The actions of the shim's program, as containerd starts it: `start`, `delete`, `-info`, `-v`, and to
//! serve. What they print to standard output is the reply; nothing may be printed beside it, nor to
//! standard error, which containerd reads as part of it.

mod address;
mod delete;
mod flags;
mod info;
mod journal;
mod serve;
mod start;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

pub use super::bundle::BundleError;
use super::guest::Host;
pub use flags::{Flags, FlagsError};

use crate::{error_chain, registry::Registry};

/// What the program is called for containerd.
pub const RUNTIME: &str = "io.containerd.nacre.v2";

/// Why an action fails.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command line.
    #[error(transparent)]
    Flags(#[from] FlagsError),
    /// What containerd wrote to standard input can't be read.
    #[error("standard input")]
    Input(#[source] io::Error),
    /// The reply can't be written.
    #[error("the reply")]
    Reply(#[source] io::Error),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A file or socket.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The socket's path is too long.
    #[error("{}: longer than a socket's path may be", .0.display())]
    LongPath(PathBuf),
    /// A container is to join a sandbox that is not there.
    #[error("sandbox `{0}` does not run")]
    NoSandbox(String),
    /// The serving process can't be started.
    #[error("the shim can't be started")]
    Spawn(#[source] io::Error),
    /// The serving process can't serve.
    #[error("the shim can't serve")]
    Serve(#[source] io::Error),
    /// Its protocol can't.
    #[error("the shim can't serve: {0}")]
    Protocol(String),
}

/// What an action needs of the rest of the project.
pub struct Parts {
    /// What starts guests.
    pub host: fn(&Flags) -> Arc<dyn Host>,
    /// Where sandboxes are registered, for `delete`.
    pub registry: fn() -> Result<Registry, crate::registry::RegistryError>,
}

/// Runs the program.
#[must_use]
pub fn run(arguments: impl Iterator<Item = std::ffi::OsString>, parts: &Parts) -> ExitCode {
    match act(arguments, parts) {
        Ok(reply) => match io::stdout().write_all(&reply).and_then(|()| io::stdout().flush()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&CommandError::Reply(error)),
        },
        Err(error) => fail(&error),
    }
}

/// containerd shows what a failed action printed.
fn fail(error: &CommandError) -> ExitCode {
    if writeln!(io::stderr(), "containerd-shim-nacre-v2: {}", error_chain(error)).is_err() {
        // Nowhere is left to say so.
    }
    ExitCode::FAILURE
}

fn act(
    arguments: impl Iterator<Item = std::ffi::OsString>,
    parts: &Parts,
) -> Result<Vec<u8>, CommandError> {
    let flags = Flags::parse(arguments)?;
    if flags.version {
        return Ok(info::version().into_bytes());
    }
    if flags.info {
        return Ok(info::info());
    }
    match flags.action.as_str() {
        "start" => start::start(&flags),
        "delete" => delete::delete(&flags, parts),
        "" => serve::serve(&flags, parts).map(|()| Vec::new()),
        other => Err(FlagsError::Action(other.to_owned()).into()),
    }
}
