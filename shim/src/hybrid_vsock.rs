//! Reaching a guest's vsock port through the socket of `nacre-vsock`.
//!
//! The protocol is the one that Firecracker introduced: connect, send `CONNECT <port>` and a line
//! feed, read `OK <host port>` and a line feed; what follows is the guest's. The answer is read byte
//! by byte, so that none of the guest's own bytes is taken.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::sleep,
};

/// The longest answer, in bytes.
const MAX_ANSWER_BYTES: usize = 32;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket can't be reached.
    #[error("vsock socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Nobody listens on the port yet, or the backend is gone.
    #[error("nobody answers on the guest's vsock port {0}")]
    Refused(u32),
    /// The backend ended, or hung up without having read what it was asked.
    #[error("the vsock backend breaks connections off")]
    BrokenOff(#[source] io::Error),
    /// The backend does not speak the protocol.
    #[error("the vsock backend's answer is malformed")]
    Malformed,
}

/// How often a connection that breaks off before its answer is asked for again.
const ATTEMPTS: usize = 5;
/// How long it is waited for the backend's successor in between.
const BETWEEN: Duration = Duration::from_millis(20);

/// Connects to `port` of the guest behind `socket`.
///
/// A backend that dies in the moment in which it takes a connection can't leave it to its successor:
/// the connection breaks off, which is not how a guest refuses, and is asked for again.
///
/// # Errors
///
/// Fails if nobody listens there; trying again is up to the caller.
pub async fn connect(socket: &Path, port: u32) -> Result<UnixStream, ConnectError> {
    for _attempt in 1..ATTEMPTS {
        match ask(socket, port).await {
            Err(ConnectError::BrokenOff(_)) => sleep(BETWEEN).await,
            other => return other,
        }
    }
    ask(socket, port).await
}

async fn ask(socket: &Path, port: u32) -> Result<UnixStream, ConnectError> {
    let failed = |source| ConnectError::Socket { path: socket.to_owned(), source };
    let mut stream = UnixStream::connect(socket).await.map_err(failed)?;
    let asked = stream.write_all(format!("CONNECT {port}\n").as_bytes()).await;
    asked.map_err(ConnectError::BrokenOff)?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        if answer.len() >= MAX_ANSWER_BYTES {
            return Err(ConnectError::Malformed);
        }
        let byte = stream.read_u8().await.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ConnectError::Refused(port),
            _ => ConnectError::BrokenOff(error),
        })?;
        answer.push(byte);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(ConnectError::Malformed) }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn answered(answer: &'static [u8]) -> Result<Vec<u8>, ConnectError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let backend = async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1024\n");
            stream.write_all(answer).await.unwrap();
        };
        let guest = async {
            let mut stream = connect(&path, 1024).await?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            Ok(rest)
        };
        tokio::join!(backend, guest).1
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_guests() {
        assert_eq!(answered(b"OK 1073741824\nhello").await.unwrap(), b"hello");
    }

    #[tokio::test]
    async fn refusals_and_nonsense_are_told_apart() {
        assert!(matches!(answered(b"").await, Err(ConnectError::Refused(1024))));
        assert!(matches!(answered(b"NO\n").await, Err(ConnectError::Malformed)));
        let endless = answered(&[b'O'; 100]).await;
        assert!(matches!(endless, Err(ConnectError::Malformed)));
        let missing = connect(Path::new("/nonexistent/vsock"), 1).await;
        assert!(matches!(missing, Err(ConnectError::Socket { .. })));
    }

    #[tokio::test]
    async fn a_connection_that_breaks_off_before_its_answer_is_asked_for_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let backend = async {
            for _death in 1..ATTEMPTS {
                let (stream, _) = listener.accept().await.unwrap();
                // Unread bytes make it a reset.
                stream.readable().await.unwrap();
            }
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            stream
        };
        let (connected, _stream) = tokio::join!(connect(&path, 1), backend);
        connected.unwrap();
        let backend = async {
            for _death in 0..ATTEMPTS {
                drop(listener.accept().await.unwrap());
            }
        };
        let (connected, ()) = tokio::join!(connect(&path, 1), backend);
        assert!(matches!(connected, Err(ConnectError::BrokenOff(_))));
    }
}
