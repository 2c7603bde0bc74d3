//! Backends that are programs of their own.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A backend, killed at the end.
pub(crate) struct Program {
    child: Child,
    pub(crate) socket: UnixStream,
    _folder: TempDir,
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A program of ours: next to the tests, if it was built.
pub(crate) fn built(name: &str) -> PathBuf {
    let mut program = std::env::current_exe().unwrap();
    program.pop();
    program.pop();
    program.push(name);
    program
}

impl Program {
    /// `None`, and a word about it, if there is no such program. The arguments are made of a path
    /// for what it serves and one for its socket.
    pub(crate) fn start(
        program: &Path,
        arguments: impl Fn(&Path, &Path) -> Vec<OsString>,
    ) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (served, socket) = (folder.path().join("served"), folder.path().join("socket"));
        let started =
            Command::new(program).args(arguments(&served, &socket)).stdin(Stdio::null()).spawn();
        let child = match started {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: there is no {}", program.display());
                return None;
            }
            other => other.unwrap(),
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        let socket = loop {
            match UnixStream::connect(&socket) {
                Ok(socket) => break socket,
                Err(error) => {
                    assert!(Instant::now() < deadline, "{program:?} does not listen: {error}");
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Some(Self { child, socket, _folder: folder })
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }
}
