//! `delete`: clears away all that is left of a container, whether or not its shim lives. containerd
//! runs it after a shim has died and after every ordinary deletion, and gives it five seconds.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse, KillRequest, WaitRequest},
    shim_async::TaskClient,
    ttrpc::{
        asynchronous::{Client, transport::Socket},
        context,
    },
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{CommandError, Flags, Parts, address};
use crate::{
    error_chain,
    registry::RegistryError,
    service::{bundle, events, mounts, process::End},
};

/// How long a shim that is about to end may take.
const ENDS_ITSELF: Duration = Duration::from_millis(1500);
/// How long one that was killed may take.
const ENDS_KILLED: Duration = Duration::from_secs(1);
/// How long the shim of a pod may take for each step of the end of a container.
const STEP: Duration = Duration::from_millis(1200);

pub(super) fn delete(flags: &Flags, parts: &Parts) -> Result<Vec<u8>, CommandError> {
    let folder = flags.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    // Whatever is wrong with it, what can be cleared away is.
    let spec = bundle::read_spec(&folder).ok().flatten();
    if bundle::sandbox_of(&flags.id, spec.as_ref()) == flags.id {
        end_shim(flags, &folder);
        clear_registry(flags, parts);
        forget_socket(&folder);
    } else {
        end_container(flags, &folder);
    }
    mounts::unmount_all(&folder.join("rootfs"));
    let end = End::killed();
    let mut answer = DeleteResponse::new();
    answer.set_exit_status(end.code);
    answer.set_exited_at(events::timestamp(SystemTime::now()));
    Ok(events::bytes(&answer))
}

/// Ends the process that serves the sandbox, if it does not end itself.
fn end_shim(flags: &Flags, folder: &Path) {
    let Ok(text) = fs::read_to_string(folder.join("shim.pid")) else { return };
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return };
    // Opened before it is looked at: what is looked at then is what is signalled.
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if !is_shim(pid, &flags.id) {
        return;
    }
    let has_ended = |limit: Duration| {
        let mut ready = [PollFd::new(&pidfd, PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        poll(&mut ready, limit.as_ref()).is_ok_and(|count| count > 0)
    };
    if has_ended(ENDS_ITSELF) {
        return;
    }
    if let Err(error) = pidfd_send_signal(&pidfd, Signal::KILL) {
        log::debug!("the shim is not killed: {error}");
    }
    has_ended(ENDS_KILLED);
}

/// Whether a process is the shim of `id`: its id may have been given to another process since.
fn is_shim(pid: Pid, id: &str) -> bool {
    let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
    let Ok(line) = fs::read(path) else { return false };
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| pair[0] == b"-id" && pair[1] == id.as_bytes())
        && words.contains(&b"-socket".as_slice())
}

/// Ends the sandbox's processes and takes away what they had on the host.
fn clear_registry(flags: &Flags, parts: &Parts) {
    let Ok(name) = flags.id.parse() else { return };
    let cleared = (parts.registry)().and_then(|registry| registry.remove(&name));
    match cleared {
        Ok(()) | Err(RegistryError::Unknown(_)) => {}
        Err(error) => log::warn!("the sandbox is not cleared away: {}", error_chain(&error)),
    }
}

fn forget_socket(folder: &Path) {
    let Ok(uri) = fs::read_to_string(folder.join("address")) else { return };
    let socket = address::path(uri.trim());
    if !address::is_served(socket)
        && let Err(error) = fs::remove_file(socket)
    {
        log::debug!("the socket is gone already: {error}");
    }
}

/// Has the pod's shim, if it lives, end and forget one container.
fn end_container(flags: &Flags, folder: &Path) {
    let Ok(uri) = fs::read_to_string(folder.join("address")) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let socket = address::path(uri.trim());
        let Ok(connection) = tokio::net::UnixStream::connect(socket).await else { return };
        let client = TaskClient::new(Client::new(Socket::from(connection)));
        let limit = || context::with_timeout(i64::try_from(STEP.as_nanos()).unwrap_or(i64::MAX));
        let mut kill = KillRequest::new();
        kill.set_id(flags.id.clone());
        kill.set_signal(Signal::KILL.as_raw().unsigned_abs());
        kill.set_all(true);
        if client.kill(limit(), &kill).await.is_ok() {
            let mut wait = WaitRequest::new();
            wait.set_id(flags.id.clone());
            if let Err(error) = client.wait(limit(), &wait).await {
                log::debug!("the container does not end: {error}");
            }
        }
        let mut delete = DeleteRequest::new();
        delete.set_id(flags.id.clone());
        if let Err(error) = client.delete(limit(), &delete).await {
            log::debug!("the container is not deleted: {error}");
        }
    });
}
