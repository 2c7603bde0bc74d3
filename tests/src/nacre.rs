//! The `nacre` command as a user types it, with a state folder of its own.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::artifacts;
use crate::process::{Process, read_all};

/// How long a sandbox may take on an emulated host with two busy processors.
pub const SANDBOX_PATIENCE: Duration = Duration::from_secs(240);

/// A container's command that wants more than 32 MiB, in a file system in memory: of these pages
/// none can be taken away, so it comes to its end at once.
pub const EATER: &[&str] = &["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=60"];

/// The steps of creating a sandbox, as the programs' debug builds know them.
pub const CREATE_STEPS: [&str; 11] = [
    "claim",
    "network",
    "cgroup",
    "backends-spawned",
    "backends-ready",
    "vmm",
    "agent",
    "configure",
    "create-container",
    "streams",
    "start-container",
];

/// A user with an empty state folder.
#[derive(Debug)]
pub struct User {
    state: TempDir,
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    /// Its exit code, or none if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub said: String,
}

impl User {
    /// A new user.
    ///
    /// # Errors
    ///
    /// Fails if there is no room for a folder.
    pub fn new() -> Result<Self> {
        Ok(Self { state: tempfile::tempdir()? })
    }

    /// Where the sandboxes' state lies.
    #[must_use]
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// `nacre ARGS...`, not yet started.
    ///
    /// # Errors
    ///
    /// Fails if `nacre` is not built.
    pub fn command<S: Into<OsString> + Clone>(&self, args: &[S]) -> Result<Command> {
        let mut command = Command::new(artifacts::program("nacre")?);
        command.args(args.iter().cloned().map(Into::into)).env("NACRE_STATE", self.state());
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// `nacre ARGS...`, run to its end.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started or does not end.
    pub fn nacre<S: Into<OsString> + Clone>(&self, args: &[S]) -> Result<Answer> {
        finish(&mut self.command(args)?)
    }

    /// `nacre run OPTIONS... --rootfs BUSYBOX -- COMMAND...`, run to its end.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started or does not end.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Result<Answer> {
        finish(&mut self.run_command(options, command)?)
    }

    /// The same, not yet started.
    ///
    /// # Errors
    ///
    /// Fails if `nacre` is not built.
    pub fn run_command(&self, options: &[&str], command: &[&str]) -> Result<Command> {
        let rootfs = artifacts::busybox_rootfs()?.display().to_string();
        let mut args = vec!["run"];
        args.extend(options);
        if !options.iter().any(|option| ["--rootfs", "--image"].contains(option)) {
            args.extend(["--rootfs", rootfs.as_str()]);
        }
        args.push("--");
        args.extend(command);
        self.command(&args)
    }
}

/// A command that runs and whose lines are read as they come.
#[derive(Debug)]
pub struct Attached {
    process: Process,
    lines: Receiver<String>,
}

impl Attached {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let program = PathBuf::from(command.get_program());
        let mut process = Process::start(&program, command.stdout(Stdio::piped()))?;
        let out = process.child().stdout.take().context("standard output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    // From here on nobody reads the command's output.
                    break;
                }
            }
        });
        Ok(Self { process, lines })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until it prints `line`; what comes before is skipped.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn until(&self, line: &str) -> Result<()> {
        let deadline = Instant::now() + SANDBOX_PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let said = self.lines.recv_timeout(left).with_context(|| format!("no {line:?}"))?;
            if said == line {
                return Ok(());
            }
        }
    }

    /// Waits for its end; the output is what was not waited for.
    ///
    /// # Errors
    ///
    /// Fails if it does not end.
    pub fn wait(self) -> Result<Answer> {
        let (status, said) = self.process.wait_for(SANDBOX_PATIENCE)?;
        let out = self.lines.iter().map(|line| format!("{line}\n")).collect();
        Ok(Answer { code: status.code(), out, said })
    }

    /// Reads no more of it and waits for its end.
    ///
    /// # Errors
    ///
    /// Fails if it does not end.
    pub fn leave(self) -> Result<Answer> {
        let Self { process, lines } = self;
        drop(lines);
        let (status, said) = process.wait_for(SANDBOX_PATIENCE)?;
        Ok(Answer { code: status.code(), out: String::new(), said })
    }
}

/// Runs a command whose standard output is kept.
///
/// # Errors
///
/// Fails if it can't be started or does not end.
pub fn finish(command: &mut Command) -> Result<Answer> {
    let program = PathBuf::from(command.get_program());
    let mut process = Process::start(&program, command.stdout(Stdio::piped()))?;
    let out = read_all(process.child().stdout.take().context("standard output")?);
    let (status, said) = process.wait_for(SANDBOX_PATIENCE)?;
    let out = out.join().unwrap_or_default();
    Ok(Answer { code: status.code(), out, said })
}

impl Answer {
    /// The exit code is `code`.
    ///
    /// # Errors
    ///
    /// Fails with everything that was said.
    pub fn code(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "not {code}: {self:#?}");
        Ok(self)
    }

    /// The exit code is 0 and the output is `out`.
    ///
    /// # Errors
    ///
    /// Fails with everything that was said.
    pub fn prints(self, out: &str) -> Result<Self> {
        let answer = self.code(0)?;
        ensure!(answer.out == out, "not {out:?}: {answer:#?}");
        Ok(answer)
    }

    /// Something on standard error contains `text`.
    ///
    /// # Errors
    ///
    /// Fails with everything that was said.
    pub fn tells(self, text: &str) -> Result<Self> {
        ensure!(self.said.contains(text), "nothing of {text:?}: {self:#?}");
        Ok(self)
    }
}
