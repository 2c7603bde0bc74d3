//! A program that takes a container's output as a log: it finds the output at descriptor 3, the
//! errors at 4, and closes 5 when it is ready. It outlives the container as long as it likes.

use std::{ffi::OsString, io, os::fd::OwnedFd, path::Path, process::Stdio, time::Duration};

use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::{Receiver, Sender},
    process::Command,
    time::timeout,
};

use super::{Owner, StdioError};
use crate::sys;

/// How long it may take to say that it is ready.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// The ends that are written.
pub(super) struct Pipes {
    pub(super) output: Sender,
    pub(super) error: Sender,
}

pub(super) async fn start(
    path: &Path,
    arguments: &[OsString],
    owner: Owner<'_>,
) -> Result<Pipes, StdioError> {
    let failed = |source| StdioError::Logger { path: path.to_owned(), source };
    let (pipes, mut ready) = spawn(path, arguments, owner).map_err(failed)?;
    let mut byte = [0];
    match timeout(READY_WITHIN, ready.read(&mut byte)).await {
        Ok(read) => read.map(|_| pipes).map_err(failed),
        Err(_) => Err(StdioError::LoggerMute(path.to_owned())),
    }
}

fn spawn(path: &Path, arguments: &[OsString], owner: Owner<'_>) -> io::Result<(Pipes, Receiver)> {
    let (output_read, output) = io::pipe()?;
    let (error_read, error) = io::pipe()?;
    let (ready, ready_write) = io::pipe()?;
    let mut command = Command::new(path);
    command
        .args(arguments)
        .env("CONTAINER_ID", owner.id)
        .env("CONTAINER_NAMESPACE", owner.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let handed: [OwnedFd; 3] = [output_read.into(), error_read.into(), ready_write.into()];
    sys::hand_in_from_three(command.as_std_mut(), handed)?;
    let mut process = command.spawn()?;
    // The command holds this side's copies of what was handed in.
    drop(command);
    tokio::spawn(async move {
        match process.wait().await {
            Ok(status) => log::debug!("a log program ended: {status}"),
            Err(error) => log::warn!("a log program can't be waited for: {error}"),
        }
    });
    let pipes = Pipes {
        output: Sender::from_owned_fd(output.into())?,
        error: Sender::from_owned_fd(error.into())?,
    };
    Ok((pipes, Receiver::from_owned_fd(ready.into())?))
}
