//! Becoming a supervisor in the background, and telling the program that was typed how it went.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
};

use nacre_proto::exit::RunExit;
use rustix::{
    process::{WaitOptions, setsid, waitpid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};
use serde::{Deserialize, Serialize};
use shim::sys::{Forked, fork};

use crate::failure::Failure;

/// What the daemon tells, once.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    code: u8,
    text: String,
}

/// The daemon's end of the pipe.
#[derive(Debug)]
pub(crate) struct Report(File);

/// Which process returns from [`detach`].
#[derive(Debug)]
pub(crate) enum Side {
    /// The program that was typed; the daemon has told how it went.
    Typed(Result<String, Failure>),
    /// The process between, which has nothing to do.
    Between,
    /// The daemon.
    Daemon(Report),
}

/// Forks twice: the daemon leads no session, so it never gets a terminal. To be called before any
/// thread is started.
pub(crate) fn detach() -> Result<Side, Failure> {
    let failed = |error| Failure::setup("can't become a daemon", error);
    let (reader, writer) = io::pipe().map_err(failed)?;
    match fork().map_err(failed)? {
        Forked::Parent(child) => {
            drop(writer);
            waitpid(Some(child), WaitOptions::empty())
                .map_err(|error| Failure::setup("can't become a daemon", error))?;
            Ok(Side::Typed(listen(reader)))
        }
        Forked::Child => {
            drop(reader);
            setsid().map_err(|error| Failure::setup("no session", error))?;
            match fork().map_err(failed)? {
                Forked::Parent(_) => Ok(Side::Between),
                Forked::Child => Ok(Side::Daemon(settle(writer).map_err(failed)?)),
            }
        }
    }
}

fn settle(writer: io::PipeWriter) -> io::Result<Report> {
    rustix::process::chdir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    // Standard error stays the typed program's until the container runs.
    Ok(Report(File::from(OwnedFd::from(writer))))
}

fn listen(mut reader: io::PipeReader) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = reader.read_to_end(&mut bytes);
    read.map_err(|error| Failure::setup("the supervisor can't be heard", error))?;
    match serde_json::from_slice(&bytes) {
        Ok(Told { code: 0, text }) => Ok(text),
        Ok(Told { code, text }) => Err(Failure::told(code, text)),
        Err(_nothing_whole) => Err(Failure::told(
            RunExit::Setup.into(),
            "the supervisor died before the container ran".to_owned(),
        )),
    }
}

impl Report {
    /// The container runs: from now on standard error is `log`.
    pub(crate) fn started(self, name: &str, log: &File) {
        self.tell(0, name.to_owned());
        if let Err(error) = dup2_stderr(log) {
            log::warn!("standard error stays where it is: {error}");
        }
    }

    /// It came to nothing.
    pub(crate) fn failed(self, failure: &Failure) {
        self.tell(failure.code(), failure.text());
    }

    fn tell(mut self, code: u8, text: String) {
        let told = serde_json::to_vec(&Told { code, text }).unwrap_or_default();
        if let Err(error) = self.0.write_all(&told) {
            log::debug!("nobody listens: {error}");
        }
    }
}
