//! The agent's side of a launch.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::{
    io::ioctl_fionbio,
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    pipe::{PipeFlags, pipe_with},
    process::Pid,
};
use tokio::{io::Interest, io::unix::AsyncFd, time::timeout};

use crate::{
    launch::{Answer, Order, REACHED_EXECVE, START, socket},
    process::{
        reap::{FollowError, Launching},
        state::Live,
    },
    streams::pipe::Pipe,
    sys,
};

/// How long libcontainer may take; mounts of a slow host are what takes long.
const LAUNCH_LIMIT: Duration = Duration::from_secs(60);

/// Why no process came to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// The child could not be started.
    #[error("can't start the launcher")]
    Spawn(#[source] io::Error),
    /// The child can't be followed.
    #[error("can't follow the launcher")]
    Follow(#[source] FollowError),
    /// The child can't be spoken to.
    #[error("the launcher ended without an answer")]
    Control(#[source] io::Error),
    /// The child's words make no sense.
    #[error("can't read the launcher's answer")]
    Parse(#[source] serde_json::Error),
    /// libcontainer says no.
    #[error("{0}")]
    Refused(String),
    /// Took too long.
    #[error("the launch took longer than {} s", LAUNCH_LIMIT.as_secs())]
    Limit,
    /// There is no such program, or no interpreter for it.
    #[error("no such file or directory")]
    NoProgram,
    /// The program is not executable: its mode, a folder, a format that the kernel doesn't know.
    #[error("permission denied, or no executable format (error {0})")]
    NotExecutable(i32),
    /// execve failed for another reason.
    #[error("can't execute the program")]
    Execve(#[source] io::Error),
    /// The new process died before it reached execve.
    #[error("the process ended before its program was executed")]
    Died,
}

/// A launch whose child still runs, or has just answered.
#[derive(Debug)]
pub(crate) struct Launch {
    control: AsyncFd<OwnedFd>,
    status: Pipe,
    child: Option<Live>,
}

impl Launch {
    /// Starts a child and gives it its order.
    ///
    /// # Errors
    ///
    /// Fails if there is no child or it doesn't take the order.
    pub(crate) fn order(
        launching: &Launching<'_>,
        order: &Order,
        streams: Vec<OwnedFd>,
    ) -> Result<Self, LaunchError> {
        let order = serde_json::to_vec(order).map_err(LaunchError::Parse)?;
        let launch = || -> io::Result<(OwnedFd, OwnedFd, OwnedFd, OwnedFd)> {
            let flags = SocketFlags::CLOEXEC;
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            let (status, written) = pipe_with(PipeFlags::CLOEXEC)?;
            Ok((ours, theirs, status, written))
        };
        let (ours, theirs, status, written) = launch().map_err(LaunchError::Spawn)?;
        let mut fds = vec![written];
        fds.extend(streams);
        socket::send(&ours, &order, &fds).map_err(LaunchError::Control)?;
        let pid = spawn(theirs).map_err(LaunchError::Spawn)?;
        let (child, _end) = launching.follow(pid).map_err(LaunchError::Follow)?;
        ioctl_fionbio(&ours, true).map_err(|error| LaunchError::Control(error.into()))?;
        Ok(Self {
            control: sys::watched(ours).map_err(LaunchError::Control)?,
            status: Pipe::new(status).map_err(LaunchError::Spawn)?,
            child,
        })
    }

    /// The number of the process that was made, and its terminal if it has one.
    ///
    /// # Errors
    ///
    /// Fails if none was made, or not in time; then the child is killed.
    pub(crate) async fn made(&self) -> Result<(Pid, Option<OwnedFd>), LaunchError> {
        let Ok(answer) = timeout(LAUNCH_LIMIT, self.receive()).await else {
            self.kill();
            return Err(LaunchError::Limit);
        };
        let (bytes, mut fds) = answer.map_err(LaunchError::Control)?;
        if bytes.is_empty() {
            return Err(LaunchError::Control(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_slice(&bytes).map_err(LaunchError::Parse)? {
            Answer::Failed { reason } => Err(LaunchError::Refused(reason)),
            Answer::Made { pid } => {
                let pid = Pid::from_raw(pid)
                    .ok_or_else(|| LaunchError::Refused("no process number".to_owned()))?;
                Ok((pid, fds.pop()))
            }
        }
    }

    async fn receive(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        self.control.async_io(Interest::READABLE, |fd| socket::receive(fd)).await
    }

    /// Lets a created init go on.
    ///
    /// # Errors
    ///
    /// Fails if the child is gone.
    pub(crate) fn start(&self) -> Result<(), LaunchError> {
        // One word into an empty socket buffer never blocks.
        socket::send(self.control.get_ref(), START, &[]).map_err(LaunchError::Control)
    }

    /// Waits for the outcome of the new process's execve.
    ///
    /// # Errors
    ///
    /// Fails if the program could not be executed.
    pub(crate) async fn executed(&self) -> Result<(), LaunchError> {
        let mut report = Vec::new();
        let mut buffer = [0; 16];
        loop {
            match self.status.read(&mut buffer).await.map_err(LaunchError::Control)? {
                0 => return outcome(&report),
                len => report.extend_from_slice(&buffer[..len]),
            }
        }
    }

    fn kill(&self) {
        let Some(child) = &self.child else { return };
        if let Err(error) = sys::signal_pidfd(&child.pidfd, libc::SIGKILL) {
            log::warn!("can't kill a launcher: {error}");
        }
    }
}

fn spawn(control: OwnedFd) -> io::Result<Pid> {
    let child = Command::new("/proc/self/exe")
        .arg0("nacre-agent")
        .arg("launch")
        .env_clear()
        .stdin(Stdio::from(control))
        .stdout(Stdio::null())
        .spawn()?;
    // The reaper waits for it, as for every child.
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("a process number out of range"))
}

/// What the status pipe's bytes mean.
fn outcome(report: &[u8]) -> Result<(), LaunchError> {
    match report {
        [REACHED_EXECVE] => Ok(()),
        [REACHED_EXECVE, number @ ..] => {
            let number =
                number.first_chunk().map_or(libc::EINVAL, |bytes| i32::from_le_bytes(*bytes));
            Err(refusal(number))
        }
        _ => Err(LaunchError::Died),
    }
}

/// execve's error number as what the host wants to tell apart.
fn refusal(number: i32) -> LaunchError {
    match number {
        libc::ENOENT | libc::ENOTDIR => LaunchError::NoProgram,
        libc::EACCES | libc::EPERM | libc::ENOEXEC | libc::EISDIR => {
            LaunchError::NotExecutable(number)
        }
        other => LaunchError::Execve(io::Error::from_raw_os_error(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_pipe_tells_how_far_a_process_got() {
        assert!(matches!(outcome(b""), Err(LaunchError::Died)));
        assert!(outcome(b"!").is_ok());
        assert!(matches!(outcome(b"!\x02\0\0\0"), Err(LaunchError::NoProgram)));
        assert!(matches!(outcome(b"!\x0d\0\0\0"), Err(LaunchError::NotExecutable(13))));
        assert!(matches!(outcome(b"!\x0c\0\0\0"), Err(LaunchError::Execve(_))));
    }

    #[test]
    fn the_host_recognises_a_missing_program_by_its_words() {
        assert!(refusal(libc::ENOENT).to_string().contains("no such file or directory"));
        assert!(refusal(libc::EACCES).to_string().contains("permission denied"));
    }
}
