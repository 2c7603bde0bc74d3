//! A device backend as a process with a socket in a scratch folder.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::artifacts;
use crate::process::{Process, Signal, until};

/// A running backend.
#[derive(Debug)]
pub struct Backend {
    program: String,
    args: Vec<OsString>,
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
        let socket = dir.join(format!("{program}-{}.sock", std::process::id()));
        let args: Vec<_> = args.iter().map(|arg| arg.as_ref().to_owned()).collect();
        let process = launch(program, &args, &socket)?;
        Ok(Self { program: program.to_owned(), args, process, socket })
    }

    /// Has another process take its place: after SIGKILL, or in peace after SIGTERM.
    ///
    /// # Errors
    ///
    /// Fails if the old process does not end, or the new one does.
    pub fn replace(self, signal: Signal) -> Result<Self> {
        self.process.signal(signal)?;
        let (status, said) = self.process.wait()?;
        ensure!(status.code() == Some(0) || signal == Signal::KILL, "{status}: {said}");
        // A process that was killed leaves its socket.
        if self.socket.exists() {
            fs::remove_file(&self.socket)?;
        }
        let process = launch(&self.program, &self.args, &self.socket)?;
        Ok(Self { process, ..self })
    }

    /// Connects to it, as soon as it listens.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn connect(&self) -> Result<UnixStream> {
        let mut connected = None;
        until("a connection to the backend", || {
            // Its socket is there a moment before it listens.
            connected = UnixStream::connect(&self.socket).ok();
            Ok(connected.is_some())
        })?;
        connected.with_context(|| format!("{} listens", self.program))
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

fn launch(program: &str, args: &[OsString], socket: &Path) -> Result<Process> {
    let path = artifacts::program(program)?;
    let mut command = Command::new(&path);
    command.args(args).arg("--socket-path").arg(socket);
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
    Ok(process)
}
