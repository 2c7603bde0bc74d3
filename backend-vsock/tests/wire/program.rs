//! The device under test, and host programs that talk to it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use backend_daemon::testing::{DEADLINE, Daemon, connect_soon};
use tempfile::TempDir;

pub const CID: u64 = 52;

/// A running device with the folder of its host programs.
pub struct Device {
    pub daemon: Daemon,
    pub folder: TempDir,
}

impl Device {
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    pub fn start_in(folder: TempDir) -> Self {
        let path = folder.path().join("v.sock");
        let cid = CID.to_string();
        let args = ["--guest-cid".as_ref(), cid.as_ref(), "--uds-path".as_ref(), path.as_os_str()];
        Self { daemon: Daemon::start(env!("CARGO_BIN_EXE_nacre-vsock"), &args), folder }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("v.sock")
    }

    /// Where a host program listens for the guest on `port`.
    pub fn port_path(&self, port: u32) -> PathBuf {
        self.folder.path().join(format!("v.sock_{port}"))
    }

    /// A host program that connects, and has said nothing.
    pub fn dial(&self) -> UnixStream {
        patient(connect_soon(&self.path()))
    }

    /// A host program that asks for a guest's port.
    pub fn ask(&self, port: u32) -> UnixStream {
        let mut stream = self.dial();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        stream
    }

    /// A host program that listens for the guest.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.port_path(port)).unwrap()
    }
}

/// Gives up waiting at the deadline of all waits.
pub fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Takes the next guest that connects.
pub fn accept(listener: &UnixListener) -> UnixStream {
    patient(listener.accept().unwrap().0)
}

/// Reads the line that says that the guest is connected; gives the host port.
pub fn greeted(stream: &mut UnixStream) -> u32 {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).unwrap();
    line.strip_prefix("OK ").unwrap().trim_end().parse().unwrap()
}

/// Reads so many bytes.
pub fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Reads until the end.
pub fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes that look random and are the same each time.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) + 1;
    let next = std::iter::repeat_with(|| {
        // Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    next.flatten().take(len).collect()
}
