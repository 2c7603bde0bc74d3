//! A process's standard streams: what the host's connections attach to, and what the process gets.

use std::{fs::File, io, os::fd::OwnedFd};

use rustix::{
    fs::{Gid, Uid, fchown},
    pipe::{PipeFlags, pipe_with},
    pty::{OpenptFlags, ioctl_tiocgptpeer},
};

use crate::streams::{
    input::{AtEnd, Input},
    output::Output,
    pipe::{Pipe, Slot},
};

/// What a process reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wiring {
    /// Three pipes, or two and an empty input.
    Pipes {
        /// Whether there is an input.
        stdin: bool,
    },
    /// One terminal, made by the launch inside the container.
    Terminal,
}

/// Who may open a process's streams again by their names in /proc.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    /// The user that the process runs as.
    pub(crate) uid: u32,
    /// And its group.
    pub(crate) gid: u32,
}

impl Owner {
    fn give(self, fd: &OwnedFd) -> io::Result<()> {
        Ok(fchown(fd, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?)
    }
}

/// The agent's side.
#[derive(Debug)]
pub(crate) struct Stdio {
    /// Absent if the host said that it has no input.
    pub(crate) stdin: Option<Input>,
    /// With a terminal: all that it shows.
    pub(crate) stdout: Output,
    /// Absent with a terminal.
    pub(crate) stderr: Option<Output>,
}

/// The process's side: standard input, output and error, in this order; none with a terminal.
pub(crate) type Inherited = Vec<OwnedFd>;

impl Stdio {
    /// Makes both sides.
    ///
    /// # Errors
    ///
    /// Fails when descriptors run out.
    pub(crate) fn new(wiring: Wiring, owner: Owner) -> io::Result<(Self, Inherited)> {
        let Wiring::Pipes { stdin } = wiring else {
            let stdio = Self {
                stdin: Some(Input::new(Slot::Awaited, AtEnd::Keep)),
                stdout: Output::new(Slot::Awaited),
                stderr: None,
            };
            return Ok((stdio, Vec::new()));
        };
        let (input, inherited_input) = if stdin {
            let (read, write) = pipe(owner)?;
            (Some(Input::new(Slot::Open(Pipe::new(write)?), AtEnd::Close)), read)
        } else {
            (None, File::open("/dev/null")?.into())
        };
        let (out, inherited_out) = pipe(owner)?;
        let (err, inherited_err) = pipe(owner)?;
        let stdio = Self {
            stdin: input,
            stdout: Output::new(Slot::Open(Pipe::new(out)?)),
            stderr: Some(Output::new(Slot::Open(Pipe::new(err)?))),
        };
        Ok((stdio, vec![inherited_input, inherited_out, inherited_err]))
    }

    /// Attaches the terminal that the launch made.
    ///
    /// # Errors
    ///
    /// Fails if the descriptor is no terminal's master.
    pub(crate) fn set_terminal(&self, master: OwnedFd, owner: Owner) -> io::Result<Pipe> {
        let peer = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        owner.give(&peer)?;
        let pipe = Pipe::new(master)?;
        if let Some(stdin) = &self.stdin {
            stdin.set_sink(Slot::Open(pipe.clone()));
        }
        self.stdout.set_source(Slot::Open(pipe.clone()));
        Ok(pipe)
    }

    /// Lets go of everything; connections that are being served finish with what they hold.
    pub(crate) fn close(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.set_sink(Slot::Gone);
        }
        self.stdout.set_source(Slot::Gone);
        if let Some(stderr) = &self.stderr {
            stderr.set_source(Slot::Gone);
        }
    }
}

fn pipe(owner: Owner) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Programs that open /dev/stdout run as their own user.
    owner.give(&read)?;
    owner.give(&write)?;
    Ok((read, write))
}
