//! Backends that are programs of their own.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A backend, killed at the end.
pub(crate) struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
    child: Child,
    pub(crate) socket: UnixStream,
    folder: TempDir,
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
        let arguments = arguments(&served, &socket);
        let child = match launch(program, &arguments) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: there is no {}", program.display());
                return None;
            }
            other => other.unwrap(),
        };
        let socket = connect(program, &socket);
        Some(Self { path: program.to_owned(), arguments, child, socket, folder })
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Makes what it serves as long as this, and tells it to look.
    pub(crate) fn resize(&self, len_bytes: u64) {
        let served = self.folder.path().join("served");
        fs::File::options().write(true).open(served).unwrap().set_len(len_bytes).unwrap();
        kill_process(Pid::from_child(&self.child), Signal::HUP).unwrap();
    }

    /// Starts it again, with the same arguments and a new connection. It has ended before.
    pub(crate) fn restart(&mut self) {
        let socket = self.folder.path().join("socket");
        fs::remove_file(&socket).ok();
        let deadline = Instant::now() + Duration::from_secs(20);
        // What the kernel does for a process after its end, such as giving up a lock, takes time.
        while !socket.exists() {
            assert!(Instant::now() < deadline, "{:?} does not start again", self.path);
            self.child = launch(&self.path, &self.arguments).unwrap();
            while !socket.exists() && self.child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        self.socket = connect(&self.path, &socket);
    }
}

fn launch(program: &Path, arguments: &[OsString]) -> io::Result<Child> {
    Command::new(program).args(arguments).stdin(Stdio::null()).spawn()
}

fn connect(program: &Path, socket: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(socket) {
            Ok(socket) => return socket,
            Err(error) => {
                assert!(Instant::now() < deadline, "{program:?} does not listen: {error}");
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
