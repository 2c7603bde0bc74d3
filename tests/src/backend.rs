//! A device backend as a process with a socket in a scratch folder.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::artifacts;
use crate::process::{Process, until};

/// A running backend.
#[derive(Debug)]
pub struct Backend {
    process: Process,
    socket: PathBuf,
}

impl Backend {
    /// Starts `program` with its socket in `dir` and waits until the socket is there.
    ///
    /// # Errors
    ///
    /// Fails if the program ends instead, with what it said.
    pub fn start<S: AsRef<OsStr>>(program: &str, dir: &Path, args: &[S]) -> Result<Self> {
        let path = artifacts::program(program)?;
        let socket = dir.join(format!("{program}-{}.sock", std::process::id()));
        let mut command = Command::new(&path);
        command.args(args).arg("--socket-path").arg(&socket);
        let mut process = Process::start(&path, &mut command)?;
        let mut ended = false;
        until("the backend's socket", || {
            ended = !process.is_running()?;
            Ok(ended || socket.exists())
        })?;
        if ended {
            let (status, said) = process.wait()?;
            bail!("{program} ended with {status}: {said}");
        }
        Ok(Self { process, socket })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends it with SIGTERM and gives its exit code and what it said.
    ///
    /// # Errors
    ///
    /// Fails if it does not end.
    pub fn stop(self) -> Result<(Option<i32>, String)> {
        self.process.terminate()?;
        let (status, said) = self.process.wait()?;
        Ok((status.code(), said))
    }
}
