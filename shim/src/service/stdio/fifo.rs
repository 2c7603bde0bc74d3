//! Fifos, without a thread each: they are opened here, so nobody else minds that they don't block.

use std::{fs::File, io, os::unix::fs::OpenOptionsExt, path::Path};

use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::mpsc,
};

use crate::stdio::{CHUNK_BYTES, Pieces};

/// How much an output may hold that nobody has read, in bytes, where the host allows it.
const PIPE_BYTES: usize = 1 << 20;

/// Opens a fifo to write, and to read, so that it never breaks.
pub(super) fn open_output(path: &Path) -> io::Result<pipe::Sender> {
    let sender = pipe::OpenOptions::new().read_write(true).open_sender(path)?;
    if let Err(error) = rustix::pipe::fcntl_setpipe_size(&sender, PIPE_BYTES) {
        log::debug!("{} stays as small as it is: {error}", path.display());
    }
    Ok(sender)
}

/// Opens a fifo to read.
pub(super) fn open_input(path: &Path) -> io::Result<pipe::Receiver> {
    pipe::OpenOptions::new().open_receiver(path)
}

/// Opens a fifo that is being read to write, so that it does not end.
pub(super) fn hold(path: &Path) -> io::Result<File> {
    File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Writes all pieces. When that fails the rest is thrown away: the process is not to wait.
pub(super) async fn write_all(mut pieces: Pieces, mut to: impl AsyncWrite + Unpin) {
    while let Some(bytes) = pieces.next().await {
        if let Err(error) = to.write_all(&bytes).await {
            log::warn!("output is lost: {error}");
            return discard(pieces).await;
        }
    }
    if let Err(error) = to.flush().await {
        log::warn!("output is lost: {error}");
    }
    drop(to);
    pieces.finish();
}

/// Throws all pieces away.
pub(super) async fn discard(mut pieces: Pieces) {
    while pieces.next().await.is_some() {}
    pieces.finish();
}

/// Passes on all that is read.
pub(super) async fn read_all(mut from: pipe::Receiver, to: mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => {
                if to.send(buffer[..read].to_vec()).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                log::debug!("standard input ends: {error}");
                return;
            }
        }
    }
}
