//! A backend's program under test, as a child process with a folder of its own.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::DEADLINE;

/// A running backend; killed when dropped.
pub struct Daemon {
    child: Child,
    folder: TempDir,
}

impl Daemon {
    /// Starts `program` with `--socket-path` in a new folder, and `args`.
    #[must_use]
    pub fn start(program: impl AsRef<OsStr>, args: &[&OsStr]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(folder.path().join("vhost.sock")).args(args);
        Self::spawn(command, folder)
    }

    /// The same, but the process dies at its step number `step`, if fault points are compiled in.
    #[must_use]
    pub fn start_doomed(program: impl AsRef<OsStr>, args: &[&OsStr], step: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(folder.path().join("vhost.sock")).args(args);
        command.env("NACRE_FAULT_STEP", step.to_string());
        Self::spawn(command, folder)
    }

    /// Starts `command` as it is; its standard error goes to a file in `folder`.
    #[must_use]
    pub fn spawn(mut command: Command, folder: TempDir) -> Self {
        let log = File::create(folder.path().join("log")).unwrap();
        command.stderr(log).stdout(Stdio::null());
        let child = command.spawn().unwrap();
        Self { child, folder }
    }

    /// The path of its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("vhost.sock")
    }

    /// A folder that lives as long as this value.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Kills it some time after `work` has begun, which is told when that has happened.
    pub fn kill_during(&self, delay: Duration, work: impl FnOnce(&AtomicBool)) {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(delay);
                self.signal(Signal::KILL);
                over.store(true, Ordering::Release);
            });
            work(&over);
        });
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end:\n{}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            crate::logging::say(&format!("--- the daemon's log:\n{log}---"));
        }
        // It may have ended already.
        match self.child.kill().and_then(|()| self.child.wait()) {
            Ok(_) | Err(_) => {}
        }
    }
}
