//! The supervisor's control socket: what `nacre device` talks to.
//!
//! Only its owner and root can reach it, it lies in the sandbox's folder, and whoever connects gets
//! one answer to one short request. Everything about a client is bounded, and nothing that it does
//! or leaves undone holds the sandbox up: requests go to a device's keeper, which decides.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use nacre_proto::{
    pci::PciAddress,
    supervisor::{Answer, Device, DeviceState, Request},
    vmm::{self, DeviceStatus, Status},
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
    backends::{Condition, DeviceHandle, ReplaceError, Roster},
    error_chain, log_file,
    packets::Packets,
    sandbox::change::{Change, Operator},
    vmm::Link,
};

/// How many clients are attended to at a time; others wait.
const MOST_CLIENTS: usize = 8;
/// How many may wait to be attended to.
const BACKLOG: i32 = 16;
/// How long a client may take to say what it wants, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause after a connection that could not be taken.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the VMM may take to tell where the devices are.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

/// The socket. Dropping it removes it, and forgets its clients.
pub(super) struct ControlSocket {
    path: PathBuf,
    counter: Arc<Counter>,
    // Aborted with the socket.
    _serving: JoinSet<()>,
}

/// What clients are served from.
struct Counter {
    roster: Roster,
    link: Link,
    /// There is one once the container runs.
    operator: OnceLock<Arc<Operator>>,
}

impl ControlSocket {
    /// Listens at `path`.
    ///
    /// # Errors
    ///
    /// Fails as making a socket does.
    pub(super) fn open(path: PathBuf, roster: Roster, link: Link) -> io::Result<Self> {
        let kind = SocketType::SEQPACKET;
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrUnix::new(&path)?)?;
        let counter = Arc::new(Counter { roster, link, operator: OnceLock::new() });
        let mut opened = Self { path, counter: Arc::clone(&counter), _serving: JoinSet::new() };
        chmod(&opened.path, Mode::RUSR | Mode::WUSR)?;
        listen(&socket, BACKLOG)?;
        let listener = Packets::new(socket)?;
        opened._serving.spawn(serve(listener, counter));
        Ok(opened)
    }

    /// From now on the sandbox can be changed.
    pub(super) fn employ(&self, operator: Arc<Operator>) {
        if self.counter.operator.set(operator).is_err() {
            log::debug!("there is an operator already");
        }
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

async fn serve(listener: Packets, counter: Arc<Counter>) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < MOST_CLIENTS => match accepted {
                Ok(client) => {
                    clients.spawn(attend(client, Arc::clone(&counter)));
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

async fn attend(client: Packets, counter: Arc<Counter>) {
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
        Ok(request) => carry_out(request, &counter).await,
        Err(error) => Answer::Refused(format!("the request is {error}")),
    };
    let sent = async {
        let datagram = vmm::encode(&answer).map_err(io::Error::other)?;
        timeout(PATIENCE, client.send(&datagram, &[])).await?
    };
    if let Err(error) = sent.await {
        log::debug!("a client does not take its answer: {error}");
    }
}

fn is_trusted(client: &Packets) -> io::Result<bool> {
    let peer = socket_peercred(client)?.uid;
    Ok(peer.is_root() || peer == geteuid())
}

async fn carry_out(request: Request, counter: &Counter) -> Answer {
    let change = match request {
        Request::ListDevices => return Answer::Devices(counter.list().await),
        Request::ReplaceDevice { device, program } => {
            return counter.replace(&device, program.map(PathBuf::from)).await;
        }
        Request::Resize { cpus, memory_bytes } => Change::Resize { cpus, memory_bytes },
        Request::AddDevice(new) => Change::Add(new),
        Request::RemoveDevice { device } => Change::Remove(device),
    };
    match counter.operator.get() {
        Some(operator) => operator.carry_out(change).await,
        None => Answer::Refused("the sandbox's container does not run yet".to_owned()),
    }
}

impl Counter {
    async fn list(&self) -> Vec<Device> {
        let told = self.link.status(TOLD_WITHIN).await;
        let told = told.map_err(|error| log::debug!("{}", error_chain(&error))).ok();
        let handles = self.roster.all();
        let kept = handles.iter().map(|handle| describe(handle, told.as_ref()));
        let others = told.iter().flat_map(|told| &told.devices);
        let others = others.filter(|device| device.state == vmm::DeviceState::Passthrough);
        kept.chain(others.map(passthrough)).collect()
    }

    async fn replace(&self, device: &str, program: Option<PathBuf>) -> Answer {
        let Some(handle) = self.roster.find(device) else {
            return Answer::Refused(format!("there is no device `{device}`"));
        };
        match handle.replace(program).await {
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

/// A device of the host's, which the VMM alone has.
fn passthrough(told: &DeviceStatus) -> Device {
    Device {
        id: log_file::printable(&told.id),
        kind: "vfio".to_owned(),
        state: DeviceState::Passthrough,
        pid: 0,
        program: "-".to_owned(),
        restarts: 0,
        address: told.address.parse::<PciAddress>().ok().map(|address| address.to_string()),
        leaving: told.leaving,
    }
}

fn describe(handle: &DeviceHandle, told: Option<&Status>) -> Device {
    let view = handle.view();
    let told = told.and_then(|told| told.devices.iter().find(|device| device.id == handle.id()));
    // What is no address is not repeated.
    let address = told.and_then(|told| told.address.parse::<PciAddress>().ok());
    Device {
        id: handle.id().to_owned(),
        kind: handle.device.kind().to_owned(),
        state: match view.condition {
            Condition::Serving => DeviceState::Serving,
            Condition::Lost => DeviceState::Lost,
            Condition::Starting => DeviceState::Starting,
            Condition::Failing => DeviceState::Failing,
        },
        pid: view.process.pid,
        program: view.program.display().to_string(),
        restarts: view.restarts,
        address: address.map(|address| address.to_string()),
        leaving: told.is_some_and(|told| told.leaving),
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
