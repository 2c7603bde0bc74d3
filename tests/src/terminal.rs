//! A terminal as a person sits at: a size, keys, a screen, and the modes that a program sets.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::nacre::SANDBOX_PATIENCE;
use crate::process::Process;

/// A terminal; what is shown on it is read by a thread of its own.
#[derive(Debug)]
pub struct Terminal {
    keys: File,
    /// The programs' end, kept open so that the modes can be asked when no program is there.
    programs: File,
    shown: Receiver<Vec<u8>>,
    screen: String,
}

impl Terminal {
    /// One of so many rows and columns.
    ///
    /// # Errors
    ///
    /// Fails if the kernel gives none.
    pub fn open(rows: u16, columns: u16) -> Result<Self> {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&keys)?;
        unlockpt(&keys)?;
        let name = ptsname(&keys, Vec::new())?.into_string()?;
        let programs = File::options().read(true).write(true).open(name)?;
        let keys = File::from(keys);
        let mut output = keys.try_clone()?;
        let (sender, shown) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The end is an error when no program has it open any more.
            while let Ok(read) = output.read(&mut buffer) {
                if read == 0 || sender.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        let terminal = Self { keys, programs, shown, screen: String::new() };
        terminal.resize(rows, columns)?;
        Ok(terminal)
    }

    /// Starts a program whose terminal this is; its standard error stays apart.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started.
    pub fn start(&self, command: &Command) -> Result<Process> {
        // It executes the program in its own place.
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        let end = || Ok::<_, anyhow::Error>(Stdio::from(self.programs.try_clone()?));
        session.stdin(end()?).stdout(end()?);
        Process::start(Path::new(command.get_program()), &mut session)
    }

    /// Changes its size; the program in front hears of it.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.keys, size)?)
    }

    /// Types.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn types(&mut self, keys: &str) -> Result<()> {
        Ok(self.keys.write_all(keys.as_bytes())?)
    }

    /// Waits until the screen shows `text`; what came up to it is not looked at again.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn until(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + SANDBOX_PATIENCE;
        loop {
            if let Some(at) = self.screen.find(text) {
                self.screen.drain(..at + text.len());
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let more = self.shown.recv_timeout(left);
            let more = more.with_context(|| format!("no {text:?} in {:?}", self.screen))?;
            self.screen.push_str(&String::from_utf8_lossy(&more));
        }
    }

    /// Whether it passes lines on and acts on Ctrl-C itself, as when nobody changed its modes.
    ///
    /// # Errors
    ///
    /// Fails if the kernel can't tell.
    pub fn is_cooked(&self) -> Result<bool> {
        let modes = tcgetattr(&self.programs)?.local_modes;
        Ok(modes.contains(LocalModes::ICANON | LocalModes::ISIG | LocalModes::ECHO))
    }
}
