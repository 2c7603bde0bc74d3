//! A child process that is never waited for without a deadline and never outlives its test.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::sys;

/// How long anything may take here: far above what it takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a condition is looked at that nothing signals.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stderr: Option<JoinHandle<String>>,
}

impl Process {
    /// Starts a program whose standard error is kept.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started.
    pub fn start(program: &Path, command: &mut Command) -> Result<Self> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let stderr = child.stderr.take().map(read_all);
        Ok(Self { name, child, stderr })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child's own pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Whether it still runs.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not know.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for the end; gives the status and what was said on standard error.
    ///
    /// # Errors
    ///
    /// Fails if it takes longer than [`PATIENCE`]: it is killed then.
    pub fn wait(self) -> Result<(ExitStatus, String)> {
        self.wait_for(PATIENCE)
    }

    /// Waits for the end; gives the status and what was said on standard error.
    ///
    /// # Errors
    ///
    /// Fails if it takes longer than `patience`: it is killed then.
    pub fn wait_for(mut self, patience: Duration) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                let said = self.said();
                bail!("{} did not end within {patience:?}: {said}", self.name);
            }
            thread::sleep(LOOK_EVERY);
        };
        Ok((status, self.said()))
    }

    /// SIGTERM.
    ///
    /// # Errors
    ///
    /// Fails if the process is gone.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Any signal.
    ///
    /// # Errors
    ///
    /// Fails if the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal)?;
        Ok(())
    }

    fn said(&mut self) -> String {
        self.stderr.take().and_then(|reader| reader.join().ok()).unwrap_or_default()
    }
}

impl Drop for Process {
    #[expect(
        clippy::print_stderr,
        reason = "what a process said belongs to a failed test's output"
    )]
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // The only failure is that it ended in between.
            drop(self.child.kill());
            drop(self.child.wait());
        }
        let said = self.said();
        if thread::panicking() && !said.is_empty() {
            eprintln!("--- {} said:\n{said}", self.name);
        }
    }
}

/// A copy of an inherited descriptor, by its number.
///
/// # Errors
///
/// Fails if there is none.
pub fn inherited(number: i32) -> Result<OwnedFd> {
    sys::duplicate(number).with_context(|| format!("no descriptor {number} was inherited"))
}

/// Reads a pipe to its end on a thread of its own.
pub fn read_all(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A pipe that breaks ends what can be read.
        drop(pipe.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The child of process `parent` that is called `name`, if there is one.
///
/// # Errors
///
/// Fails if the kernel can't be asked.
pub fn child_of(parent: u32, name: &str) -> Result<Option<Pid>> {
    let children = children_of(parent)?;
    Ok(children.into_iter().find(|(_, comm)| comm == name).map(|(pid, _)| pid))
}

/// The children of process `parent` and how they are called.
///
/// # Errors
///
/// Fails if the kernel can't be asked.
pub fn children_of(parent: u32) -> Result<Vec<(Pid, String)>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(stat) = fs::read_to_string(path.join("stat")) else { continue };
        let Some((start, rest)) = stat.split_once(") ") else { continue };
        let Some((pid, comm)) = start.split_once(" (") else { continue };
        let of = rest.split(' ').nth(1).and_then(|of| of.parse::<u32>().ok());
        if of == Some(parent) {
            children.extend(Pid::from_raw(pid.parse()?).map(|pid| (pid, comm.to_owned())));
        }
    }
    Ok(children)
}

/// The child of process `parent` that is called `name`, once it is there.
///
/// # Errors
///
/// Fails if there is no such child in time.
pub fn await_child_of(parent: u32, name: &str) -> Result<Pid> {
    let mut child = None;
    until(name, || {
        child = child_of(parent, name)?;
        Ok(child.is_some())
    })?;
    child.context("a child")
}

/// SIGKILL to the child of process `parent` that is called `name`, once it is there.
///
/// # Errors
///
/// Fails if there is no such child in time.
pub fn kill_child_of(parent: u32, name: &str) -> Result<()> {
    kill_process(await_child_of(parent, name)?, Signal::KILL)?;
    Ok(())
}

/// Looks at a condition until it holds.
///
/// # Errors
///
/// Fails if it does not hold within [`PATIENCE`].
pub fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("not within {PATIENCE:?}: {what}");
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}
