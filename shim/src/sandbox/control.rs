//! The supervisor's control socket: what `nacre device` talks to.
//!
//! Only its owner and root can reach it, it lies in the sandbox's folder, and whoever connects gets
//! one answer to one short request. Everything about a client is bounded, and nothing that it does
//! or leaves undone holds the sandbox up: requests go to a device's keeper, which decides.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nacre_proto::{
    supervisor::{Answer, Device, DeviceState, Request},
    vmm,
};
use rustix::{
    fs::{Mode, chmod},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
        sockopt::socket_peercred,
    },
    process::geteuid,
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    backends::{Condition, DeviceHandle, ReplaceError},
    packets::Packets,
};

/// How many clients are attended to at a time; others wait.
const MOST_CLIENTS: usize = 8;
/// How many may wait to be attended to.
const BACKLOG: i32 = 16;
/// How long a client may take to say what it wants, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause after a connection that could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// The socket. Dropping it removes it, and forgets its clients.
#[derive(Debug)]
pub(super) struct ControlSocket {
    path: PathBuf,
    // Aborted with the socket.
    _serving: JoinSet<()>,
}

impl ControlSocket {
    /// Listens at `path`.
    ///
    /// # Errors
    ///
    /// Fails as making a socket does.
    pub(super) fn open(path: PathBuf, devices: &[DeviceHandle]) -> io::Result<Self> {
        let kind = SocketType::SEQPACKET;
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrUnix::new(&path)?)?;
        let mut opened = Self { path, _serving: JoinSet::new() };
        chmod(&opened.path, Mode::RUSR | Mode::WUSR)?;
        listen(&socket, BACKLOG)?;
        let listener = Packets::new(socket)?;
        opened._serving.spawn(serve(listener, devices.into()));
        Ok(opened)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        log::debug!("can't remove {}: {error}", path.display());
    }
}

async fn serve(listener: Packets, devices: Arc<[DeviceHandle]>) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < MOST_CLIENTS => match accepted {
                Ok(client) => {
                    clients.spawn(attend(client, Arc::clone(&devices)));
                }
                Err(error) => {
                    log::debug!("a client can't be taken: {error}");
                    sleep(PAUSE).await;
                }
            },
            Some(_attended) = clients.join_next() => {}
        }
    }
}

async fn attend(client: Packets, devices: Arc<[DeviceHandle]>) {
    match is_trusted(&client) {
        Ok(true) => {}
        Ok(false) => return log::warn!("somebody else's request is not taken"),
        Err(error) => return log::debug!("a client is not known: {error}"),
    }
    let mut buffer = vec![0; vmm::MAX_BYTES];
    let received = match timeout(PATIENCE, client.receive(&mut buffer)).await {
        Ok(Ok(received)) if received.len_bytes > 0 && !received.is_cut => received,
        _ => return log::debug!("a client says nothing"),
    };
    let answer = match vmm::decode(&buffer[..received.len_bytes]) {
        Ok(request) => carry_out(request, &devices).await,
        Err(error) => Answer::Refused(format!("the request is {error}")),
    };
    let sent = async {
        let datagram = vmm::encode(&answer).map_err(io::Error::other)?;
        timeout(PATIENCE, client.send(&datagram, None)).await?
    };
    if let Err(error) = sent.await {
        log::debug!("a client does not take its answer: {error}");
    }
}

fn is_trusted(client: &Packets) -> io::Result<bool> {
    let peer = socket_peercred(client)?.uid;
    Ok(peer.is_root() || peer == geteuid())
}

async fn carry_out(request: Request, devices: &[DeviceHandle]) -> Answer {
    match request {
        Request::ListDevices => Answer::Devices(devices.iter().map(describe).collect()),
        Request::ReplaceDevice { device, program } => {
            let Some(handle) = devices.iter().find(|handle| handle.id == device) else {
                return Answer::Refused(format!("there is no device `{device}`"));
            };
            match handle.replace(program.map(PathBuf::from)).await {
                Ok(unserved) => {
                    let unserved_ms = u64::try_from(unserved.as_millis()).unwrap_or(u64::MAX);
                    Answer::Replaced { unserved_ms }
                }
                Err(ReplaceError::FellBack(why)) => Answer::FellBack(why),
                Err(ReplaceError::NotBack(why)) => Answer::NotBack(why),
                Err(error) => Answer::Refused(error.to_string()),
            }
        }
    }
}

fn describe(handle: &DeviceHandle) -> Device {
    let view = handle.view();
    Device {
        id: handle.id.clone(),
        kind: handle.kind.to_owned(),
        state: match view.condition {
            Condition::Serving => DeviceState::Serving,
            Condition::Lost => DeviceState::Lost,
            Condition::Starting => DeviceState::Starting,
            Condition::Failing => DeviceState::Failing,
        },
        pid: view.process.pid,
        program: view.program.display().to_string(),
        restarts: view.restarts,
        restartable: handle.is_restartable,
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
