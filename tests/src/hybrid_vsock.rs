//! A host program's way to a guest's port, as `nacre-vsock` offers it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::process::PATIENCE;

/// Connects through the backend, which listens at `path`, to `port` of the guest. Reads from it
/// have a deadline.
///
/// # Errors
///
/// Fails if the backend is not there, or nobody listens in the guest.
pub fn connect(path: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("the answer to CONNECT")?;
        answer.push(byte[0]);
    }
    ensure!(answer.starts_with(b"OK "), "{}", String::from_utf8_lossy(&answer));
    Ok(stream)
}
