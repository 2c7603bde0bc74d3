//! `nacre-vmm` with a guest that has no kernel: started, listened to, waited for.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_proto::exit::VmmExit;

use crate::artifacts;
use crate::process::{PATIENCE, Process};
use crate::sys;

/// What a machine is started with.
#[derive(Debug)]
pub struct Machine {
    command: Command,
    inherited: Vec<OwnedFd>,
}

/// A running machine.
#[derive(Debug)]
pub struct Running {
    process: Process,
    lines: Receiver<(String, Instant)>,
    heard: Vec<String>,
    heard_at: Instant,
}

/// How a machine ended.
#[derive(Debug)]
pub struct Ended {
    /// The VMM's exit code, or none if a signal ended it.
    pub code: Option<i32>,
    /// The guest's lines.
    pub guest: Vec<String>,
    /// The VMM's standard error.
    pub said: String,
}

impl Machine {
    /// One vCPU, 64 MiB, and the scenario of the bare guest called `name`.
    ///
    /// # Errors
    ///
    /// Fails if the VMM or the guest is not built.
    pub fn bare(name: &str) -> Result<Self> {
        let mut command = Command::new(artifacts::program("nacre-vmm")?);
        command.arg("--kernel").arg(artifacts::bare_guest()?);
        command.args(["--cmdline", &format!("test={name}"), "--serial", "stdio"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Self { command, inherited: Vec::new() })
    }

    /// A guest of a Linux kernel.
    ///
    /// # Errors
    ///
    /// Fails if the VMM is not built.
    pub fn linux(kernel: &Path, initramfs: &Path, cmdline: &str) -> Result<Self> {
        let mut command = Command::new(artifacts::program("nacre-vmm")?);
        command.arg("--kernel").arg(kernel).arg("--initramfs").arg(initramfs);
        command.args(["--cmdline", cmdline, "--serial", "stdio"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Self { command, inherited: Vec::new() })
    }

    /// Adds arguments of the VMM.
    #[must_use]
    pub fn with(mut self, args: &[&str]) -> Self {
        self.command.args(args);
        self
    }

    /// Adds a device: its name and type, and its backend's socket.
    #[must_use]
    pub fn device(self, name: &str, kind: &str, socket: &Path) -> Self {
        let device = format!("id={name},socket={},type={kind}", socket.display());
        self.with(&["--vhost-user", &device])
    }

    /// Adds a device: its name and type, and the connected socket of its backend.
    #[must_use]
    pub fn device_at(mut self, name: &str, kind: &str, socket: OwnedFd) -> Self {
        let device = format!("id={name},fd={},type={kind}", socket.as_raw_fd());
        self.inherited.push(socket);
        self.with(&["--vhost-user", &device])
    }

    /// Adds a control socket: the VMM's end.
    #[must_use]
    pub fn control(mut self, socket: OwnedFd) -> Self {
        let number = socket.as_raw_fd().to_string();
        self.inherited.push(socket);
        self.with(&["--control-fd", &number])
    }

    /// Lets the guest's serial port be spoken to.
    #[must_use]
    pub fn with_input(mut self) -> Self {
        self.command.stdin(Stdio::piped());
        self
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// Fails if the VMM can't be started.
    pub fn start(mut self) -> Result<Running> {
        let given: Vec<_> = self.command.get_args().map(ToOwned::to_owned).collect();
        for (flag, value) in [("--cpus", "1"), ("--memory", "64M")] {
            if !given.iter().any(|arg| arg == flag) {
                self.command.args([flag, value]);
            }
        }
        sys::hand_in(&mut self.command, std::mem::take(&mut self.inherited));
        let program = artifacts::program("nacre-vmm")?;
        Running::heard(Process::start(&program, &mut self.command)?)
    }

    /// Starts it and waits until it ended.
    ///
    /// # Errors
    ///
    /// Fails if the VMM can't be started or does not end.
    pub fn run(self) -> Result<Ended> {
        self.start()?.wait()
    }

    /// Starts it and waits until it ended, at most for `patience`.
    ///
    /// # Errors
    ///
    /// Fails if the VMM can't be started or does not end.
    pub fn run_for(self, patience: Duration) -> Result<Ended> {
        self.start()?.wait_for(patience)
    }
}

impl Running {
    /// A guest whose serial port is the standard output of its VMM, whichever that is.
    ///
    /// # Errors
    ///
    /// Fails if that is no pipe.
    pub fn heard(mut process: Process) -> Result<Self> {
        let serial = process.child().stdout.take().context("the VMM's standard output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(serial).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send((line, Instant::now())).is_err() {
                    break;
                }
            }
        });
        Ok(Self { process, lines, heard: Vec::new(), heard_at: Instant::now() })
    }

    /// The VMM's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until the guest says a line that begins with `start`; gives the rest of that line.
    ///
    /// # Errors
    ///
    /// Fails if the guest says `FAIL`, ends, or stays silent too long.
    pub fn until(&mut self, start: &str) -> Result<String> {
        self.until_within(PATIENCE, start)
    }

    /// The same, of a guest that takes longer.
    ///
    /// # Errors
    ///
    /// Fails if the guest says `FAIL`, ends, or stays silent too long.
    pub fn until_within(&mut self, patience: Duration, start: &str) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (line, at) = match self.lines.recv_timeout(left) {
                Ok(heard) => heard,
                Err(RecvTimeoutError::Timeout) => bail!("no {start:?}; heard {:?}", self.heard),
                Err(RecvTimeoutError::Disconnected) => bail!("ended; heard {:?}", self.heard),
            };
            self.heard.push(line.clone());
            self.heard_at = at;
            if let Some(rest) = line.strip_prefix(start) {
                return Ok(rest.to_owned());
            }
            ensure!(!line.starts_with("FAIL"), "the guest failed: {line}; heard {:?}", self.heard);
        }
    }

    /// When the line came that was waited for last.
    #[must_use]
    pub fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// Waits until the VMM ended.
    ///
    /// # Errors
    ///
    /// Fails if it does not end.
    pub fn wait(self) -> Result<Ended> {
        self.wait_for(PATIENCE)
    }

    /// Waits until the VMM ended, at most for `patience`.
    ///
    /// # Errors
    ///
    /// Fails if it does not end.
    pub fn wait_for(self, patience: Duration) -> Result<Ended> {
        let Self { process, lines, mut heard, .. } = self;
        let (status, said) = process.wait_for(patience)?;
        heard.extend(lines.iter().map(|(line, _)| line));
        Ok(Ended { code: status.code(), guest: heard, said })
    }
}

impl Ended {
    /// The scenario passed and the guest powered off.
    ///
    /// # Errors
    ///
    /// Fails with everything that was said.
    pub fn passed(self, name: &str) -> Result<Self> {
        let pass = format!("PASS {name}");
        ensure!(
            self.guest.contains(&pass) && self.ended(VmmExit::PowerOff),
            "{name} did not pass: {self:#?}"
        );
        Ok(self)
    }

    /// Whether the VMM ended in this way.
    #[must_use]
    pub fn ended(&self, exit: VmmExit) -> bool {
        self.code == Some(i32::from(u8::from(exit)))
    }

    /// The value of the guest's line `key=value`.
    ///
    /// # Errors
    ///
    /// Fails if the guest said no such line.
    pub fn value(&self, key: &str) -> Result<&str> {
        let start = format!("{key}=");
        self.guest
            .iter()
            .find_map(|line| line.strip_prefix(start.as_str()))
            .with_context(|| format!("no {key} in {:?}", self.guest))
    }
}
