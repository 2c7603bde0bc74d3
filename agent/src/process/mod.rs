//! A process of a container: its state, its end, its streams, its terminal's size.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, OnceLock, PoisonError},
};

use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::watch;

use crate::{
    ids::ProcessId,
    process::{
        state::{Event, Exit, IllegalEvent, Live, State},
        stdio::{Inherited, Owner, Stdio, Wiring},
    },
    streams::pipe::Pipe,
    sys,
};

pub(crate) mod reap;
pub(crate) mod state;
pub(crate) mod stdio;

/// Why something can't be done to a process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    /// Not in this state.
    #[error("not possible in this state")]
    State(#[from] IllegalEvent),
    /// A signal to a process that was not started.
    #[error("the process was not started")]
    NotStarted,
    /// A signal to a process that is over.
    #[error("the process has ended")]
    Ended,
    /// The kernel refuses the signal.
    #[error("can't send signal {signal}")]
    Signal {
        /// Which.
        signal: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A size for a process without a terminal.
    #[error("the process has no terminal")]
    NoTerminal,
    /// The terminal failed.
    #[error("can't set the terminal up")]
    Terminal(#[source] io::Error),
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Size {
    /// Width.
    pub(crate) columns: u16,
    /// Height.
    pub(crate) rows: u16,
}

impl Size {
    /// Gives the terminal behind `fd` this size; its foreground processes get SIGWINCH.
    pub(crate) fn apply(self, fd: impl AsFd) -> io::Result<()> {
        let size = Winsize { ws_row: self.rows, ws_col: self.columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(fd, size)?)
    }
}

/// A process from its creation until it is deleted.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its name.
    pub(crate) id: ProcessId,
    /// Its standard streams.
    pub(crate) stdio: Stdio,
    wiring: Wiring,
    owner: Owner,
    state: watch::Sender<State>,
    /// Asked for before there was a terminal; locked for a copy only.
    size: Mutex<Option<Size>>,
    terminal: OnceLock<Pipe>,
}

impl Process {
    /// A process that is not started, and what it will inherit.
    ///
    /// # Errors
    ///
    /// Fails when descriptors run out.
    pub(crate) fn new(
        id: ProcessId,
        wiring: Wiring,
        owner: Owner,
    ) -> io::Result<(Self, Inherited)> {
        let (stdio, inherited) = Stdio::new(wiring, owner)?;
        let process = Self {
            id,
            stdio,
            wiring,
            owner,
            state: watch::Sender::new(State::Created(None)),
            size: Mutex::default(),
            terminal: OnceLock::new(),
        };
        Ok((process, inherited))
    }

    /// The container's init exists and waits before its execve.
    pub(crate) fn set_waiting(&self, live: Live) {
        self.state.send_if_modified(|state| {
            let created = matches!(state, State::Created(None));
            if created {
                *state = State::Created(Some(live));
            }
            created
        });
    }

    /// Applies an event.
    ///
    /// # Errors
    ///
    /// Fails, and changes nothing, if the event makes no sense now.
    pub(crate) fn apply(&self, event: Event) -> Result<(), IllegalEvent> {
        let mut outcome = Ok(());
        self.state.send_if_modified(|state| match state.after(event) {
            Ok(next) => {
                *state = next;
                true
            }
            Err(illegal) => {
                outcome = Err(illegal);
                false
            }
        });
        outcome
    }

    /// The process as the kernel knows it, if it does.
    pub(crate) fn live(&self) -> Option<Live> {
        self.state.borrow().live().cloned()
    }

    /// Whether its program runs.
    pub(crate) fn is_running(&self) -> bool {
        matches!(*self.state.borrow(), State::Running(_))
    }

    /// Whether nobody has started it.
    pub(crate) fn is_unstarted(&self) -> bool {
        matches!(*self.state.borrow(), State::Created(_))
    }

    /// How it ended, if it did.
    pub(crate) fn exit(&self) -> Option<Exit> {
        self.state.borrow().exit()
    }

    /// Waits for the end.
    pub(crate) async fn ended(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let Some(exit) = state.borrow_and_update().exit() {
                return exit;
            }
            // The sender is in `self`, so this is never the end of the channel.
            if state.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Sends a signal to this process alone.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), ProcessError> {
        let Some(live) = self.live() else {
            return Err(match self.exit() {
                Some(_) => ProcessError::Ended,
                None => ProcessError::NotStarted,
            });
        };
        match sys::signal_pidfd(&live.pidfd, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(ProcessError::Ended),
            other => other.map_err(|source| ProcessError::Signal { signal, source }),
        }
    }

    /// Whether it has a terminal.
    pub(crate) fn has_terminal(&self) -> bool {
        self.wiring == Wiring::Terminal
    }

    /// The size that its terminal should have.
    pub(crate) fn size(&self) -> Option<Size> {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the terminal a size, now or when there is one.
    pub(crate) fn resize(&self, size: Size) -> Result<(), ProcessError> {
        if !self.has_terminal() {
            return Err(ProcessError::NoTerminal);
        }
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
        match self.terminal.get() {
            Some(terminal) => size.apply(terminal.fd()).map_err(ProcessError::Terminal),
            None => Ok(()),
        }
    }

    /// Attaches the terminal that the launch made.
    pub(crate) fn set_terminal(&self, master: OwnedFd) -> Result<(), ProcessError> {
        let terminal =
            self.stdio.set_terminal(master, self.owner).map_err(ProcessError::Terminal)?;
        if let Some(size) = self.size() {
            size.apply(terminal.fd()).map_err(ProcessError::Terminal)?;
        }
        // A launch makes one terminal.
        drop(self.terminal.set(terminal));
        Ok(())
    }
}
