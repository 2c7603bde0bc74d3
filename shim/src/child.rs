//! A child process of the supervisor: started with descriptors handed in, watched by a pidfd, and
//! gone, with its whole process group, when the value is dropped.
//!
//! The kernel kills a child when the *thread* that started it ends (`PR_SET_PDEATHSIG`), so
//! children are to be started from a thread that lives as long as the supervisor: the `nacre`
//! command runs everything on its main thread.

use std::{
    ffi::OsString,
    fmt, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use tokio::{io::unix::AsyncFd, time::timeout};

use crate::{
    log_file,
    record::{self, ProcessRecord},
    sys,
};

/// How many of a child's last lines are repeated when everything is told.
const DEBUG_LINES: usize = 100;

/// How large a child's log may be when another one goes on writing to it, in bytes.
const LOG_BYTES: u64 = 1 << 20;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this code.
    Code(u8),
    /// This signal ended it.
    Signal(i32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with code {code}"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
        }
    }
}

/// Why a child could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// There is no such program.
    #[error("{name}: no such program: {}", path.display())]
    Missing {
        /// What was to run.
        name: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("{name}: can't start {}", path.display())]
    Start {
        /// What was to run.
        name: String,
        /// Its program.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its log file can't be written.
    #[error("{name}: can't write its log {}", path.display())]
    Log {
        /// What was to run.
        name: String,
        /// Its log.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It runs but can't be watched.
    #[error("{name}: can't be watched")]
    Watch {
        /// What runs.
        name: String,
        /// Why not.
        source: io::Error,
    },
}

impl ChildError {
    /// Whether the program itself can't be started.
    #[must_use]
    pub fn is_about_program(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Start { .. })
    }
}

/// A program about to be started.
#[derive(Debug)]
pub struct Launch {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    inherit: Vec<OwnedFd>,
    cgroup: Option<OwnedFd>,
}

impl Launch {
    /// A launch of `program`, called `name` in messages and for its log.
    #[must_use]
    pub fn new(name: &str, program: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            program,
            arguments: Vec::new(),
            inherit: Vec::new(),
            cgroup: None,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Hands `fd` to the child and answers the number that it will have there.
    pub fn hand_in(&mut self, fd: OwnedFd) -> i32 {
        let number = fd.as_raw_fd();
        self.inherit.push(fd);
        number
    }

    /// Lets the child join the cgroup whose `cgroup.procs` this is.
    #[must_use]
    pub fn cgroup(mut self, procs: Option<OwnedFd>) -> Self {
        self.cgroup = procs;
        self
    }

    /// Starts it. What it prints goes to the end of `log`.
    ///
    /// # Errors
    ///
    /// Fails if the program is missing or the kernel refuses.
    pub fn start(self, log: &Path) -> Result<Child, ChildError> {
        let Self { name, program, arguments, inherit, cgroup } = self;
        if !program.is_file() {
            return Err(ChildError::Missing { name, path: program });
        }
        let log_error =
            |source| ChildError::Log { name: name.clone(), path: log.to_owned(), source };
        let (output, log_start_bytes) = log_file::go_on(log, LOG_BYTES).map_err(log_error)?;
        let errors = output.try_clone().map_err(log_error)?;
        log::debug!("starts {} {arguments:?}", program.display());
        let mut command = Command::new(&program);
        command.args(&arguments).stdin(Stdio::null()).stdout(output).stderr(errors);
        sys::prepare(&mut command, inherit, cgroup);
        let process = command.spawn().map_err(|source| ChildError::Start {
            name: name.clone(),
            path: program,
            source,
        })?;
        Child::watch(name, process, Log { path: log.to_owned(), start_bytes: log_start_bytes })
    }
}

/// Where a child prints to.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    /// What is before belongs to its predecessors.
    start_bytes: u64,
}

impl Log {
    fn tail(&self, lines: usize) -> Option<String> {
        log_file::tail_from(&self.path, self.start_bytes, lines)
    }
}

/// A running child. Dropping it kills its process group and waits for it.
#[derive(Debug)]
pub struct Child {
    name: String,
    // Not reaped before drop: until then the process id, and so the group's, stays taken.
    process: std::process::Child,
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    log: Log,
}

impl Child {
    fn watch(name: String, mut process: std::process::Child, log: Log) -> Result<Self, ChildError> {
        let pid = Pid::from_child(&process);
        let watched = pidfd_open(pid, PidfdFlags::NONBLOCK)
            .map_err(io::Error::from)
            .and_then(sys::watch_readable);
        match watched {
            Ok(pidfd) => Ok(Self { name, process, pid, pidfd, log }),
            Err(source) => {
                end_group(&name, pid, &mut process);
                Err(ChildError::Watch { name, source })
            }
        }
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// For the record of the sandbox.
    #[must_use]
    pub fn record(&self) -> ProcessRecord {
        let pid = self.pid.as_raw_nonzero().get();
        ProcessRecord {
            name: self.name.clone(),
            pid,
            start_time: record::start_time(pid).unwrap_or_default(),
        }
    }

    /// The last lines that it printed, fit for a terminal.
    #[must_use]
    pub fn last_words(&self) -> Option<String> {
        self.log.tail(1)
    }

    /// Waits until it has ended. May be called again, and dropped while waiting.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does.
    pub async fn ended(&self) -> io::Result<End> {
        loop {
            let _guard = self.pidfd.readable().await?;
            if let Some(end) = self.poll_end()? {
                return Ok(end);
            }
        }
    }

    fn poll_end(&self) -> io::Result<Option<End>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let status = waitid(WaitId::Pid(self.pid), options)?;
        Ok(status.map(|status| match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => End::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
            (None, signal) => End::Signal(signal.unwrap_or_default()),
        }))
    }

    /// Waits at most `limit`; `None` if it still runs then.
    pub async fn ended_within(&self, limit: Duration) -> Option<End> {
        timeout(limit, self.ended()).await.ok()?.ok()
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: Signal) {
        if let Err(error) = rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            log::debug!("{}: signal {signal:?} not sent: {error}", self.name);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if log::log_enabled!(log::Level::Debug)
            && let Some(said) = self.log.tail(DEBUG_LINES)
        {
            log::debug!("{} said at the end:\n{said}", self.name);
        }
        end_group(&self.name, self.pid, &mut self.process);
    }
}

fn end_group(name: &str, pid: Pid, process: &mut std::process::Child) {
    if let Err(error) = kill_process_group(pid, Signal::KILL) {
        log::debug!("{name}: its group was not killed: {error}");
    }
    match process.wait() {
        Ok(status) => log::debug!("{name} is gone: {status}"),
        Err(error) => log::warn!("{name}: can't be waited for: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::unix::pipe::Receiver;

    use super::*;

    fn launch(script: &str) -> Launch {
        Launch::new("test", PathBuf::from("/bin/sh")).args(["-c", script])
    }

    #[tokio::test]
    async fn the_end_of_a_child_is_seen_as_often_as_asked() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let child = launch("echo one; echo two >&2; exit 7").start(&log).unwrap();
        assert_eq!(child.ended().await.unwrap(), End::Code(7));
        assert_eq!(child.ended().await.unwrap(), End::Code(7));
        assert_eq!(child.last_words().unwrap(), "two");
    }

    #[tokio::test]
    async fn dropping_a_child_ends_its_whole_group() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let (reader, writer) = io::pipe().unwrap();
        let mut launch = launch("sleep 1000 & wait");
        launch.hand_in(OwnedFd::from(writer));
        let child = launch.start(&log).unwrap();
        assert_eq!(child.ended_within(Duration::from_millis(50)).await, None);
        drop(child);
        // The pipe closes only when no process of the group holds it any more.
        let mut reader = Receiver::from_owned_fd(reader.into()).unwrap();
        let mut byte = [0];
        let read = tokio::io::AsyncReadExt::read(&mut reader, &mut byte);
        assert_eq!(timeout(Duration::from_secs(20), read).await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn only_what_is_handed_in_is_inherited() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let (kept, handed) = io::pipe().unwrap();
        let kept_number = kept.as_raw_fd();
        let mut launch = Launch::new("test", PathBuf::from("/bin/sh"));
        let number = launch.hand_in(handed.into());
        let script = format!("test -e /proc/$$/fd/{number} && ! test -e /proc/$$/fd/{kept_number}");
        let child = launch.args(["-c".to_owned(), script]).start(&log).unwrap();
        assert_eq!(child.ended().await.unwrap(), End::Code(0));
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let launch = Launch::new("nacre-blk", folder.path().join("nacre-blk"));
        let error = launch.start(&folder.path().join("log")).unwrap_err();
        assert!(error.to_string().starts_with("nacre-blk: no such program: /"), "{error}");
    }
}
