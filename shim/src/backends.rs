//! The device backends: started side by side, each with one end of a socket pair whose other end
//! is the VMM's.

use std::{ffi::OsString, io, os::fd::OwnedFd, path::PathBuf, time::Duration};

use futures::future::{select_all, try_join_all};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use crate::{
    cgroup::{Cgroup, CgroupError},
    child::{Child, ChildError, End, Launch},
    network::Network,
    paths::SandboxFiles,
    plan::DevicePlan,
};

/// How long a backend may take until it is ready. Generous: it is no work, but the host may be
/// emulated and busy.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Why there is no backend.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// It can't be started.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// It can't be put into the host's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Its sockets can't be made.
    #[error("{name}: no socket or pipe for it")]
    Socket {
        /// Which.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// It ended.
    #[error("{name} {end}{}", said(last_words))]
    Ended {
        /// Which.
        name: String,
        /// How.
        end: End,
        /// The last line that it printed.
        last_words: Option<String>,
    },
    /// It runs and does not become ready.
    #[error("{0} does not become ready")]
    NotReady(String),
}

pub(crate) fn said(last_words: &Option<String>) -> String {
    last_words.as_ref().map(|words| format!("; its last words: {words}")).unwrap_or_default()
}

/// What every process of a sandbox is started with.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Where the programs are.
    pub programs: &'a std::path::Path,
    /// The sandbox's files.
    pub files: &'a SandboxFiles,
    /// The sandbox's cgroup on the host, if it has limits there.
    pub cgroup: Option<&'a Cgroup>,
    /// How much the processes are to log.
    pub log_level: log::LevelFilter,
}

impl Surroundings<'_> {
    /// A launch of `program`, called `name`.
    pub(crate) fn launch(&self, name: &str, program: &str) -> Result<Launch, CgroupError> {
        let procs = self.cgroup.map(Cgroup::procs).transpose()?;
        let level = self.log_level.as_str().to_ascii_lowercase();
        Ok(Launch::new(name, self.programs.join(program))
            .args(["--log-level", level.as_str()])
            .cgroup(procs))
    }
}

/// The length of a share's tag in its configuration space.
const FS_TAG_BYTES: usize = 36;

/// The VMM's end of a backend's socket.
#[derive(Debug)]
pub struct VmmEnd {
    /// The device's id.
    pub id: String,
    /// The VMM's word for the kind of device.
    pub kind: &'static str,
    /// The device's configuration space, for a backend that does not tell it. Empty: it tells.
    pub config: Vec<u8>,
    /// The socket, connected.
    pub socket: OwnedFd,
}

/// One running backend.
#[derive(Debug)]
struct Backend {
    child: Child,
    ready: pipe::Receiver,
}

/// All backends of a sandbox. Dropping them ends them.
#[derive(Debug)]
pub struct Backends {
    backends: Vec<Backend>,
}

impl Backends {
    /// Starts one for each device and waits for none.
    ///
    /// # Errors
    ///
    /// Fails if one can't be started; those before it are ended.
    pub fn start(
        devices: &[DevicePlan],
        surroundings: Surroundings<'_>,
        network: Option<&Network>,
    ) -> Result<(Self, Vec<VmmEnd>), BackendError> {
        let started = devices.iter().map(|device| start(device, surroundings, network));
        let started: Vec<(Backend, VmmEnd)> = started.collect::<Result<_, _>>()?;
        let (backends, ends) = started.into_iter().unzip();
        Ok((Self { backends }, ends))
    }

    /// Waits until all are ready.
    ///
    /// # Errors
    ///
    /// Fails as soon as one ends or takes too long.
    pub async fn ready(&mut self) -> Result<(), BackendError> {
        try_join_all(self.backends.iter_mut().map(Backend::ready)).await.map(drop)
    }

    /// Resolves when one of them has ended.
    pub async fn ended(&self) -> BackendError {
        let ends = self.backends.iter().map(|backend| Box::pin(backend.ended()));
        select_all(ends).await.0
    }

    /// Their processes.
    pub fn children(&self) -> impl Iterator<Item = &Child> {
        self.backends.iter().map(|backend| &backend.child)
    }

    /// Asks all of them to end, and waits a little.
    pub async fn stop(&self, limit: Duration) {
        for child in self.children() {
            child.signal(rustix::process::Signal::TERM);
        }
        for child in self.children() {
            match child.ended_within(limit).await {
                Some(end) => log::debug!("{} {end}", child.name()),
                None => log::debug!("{} does not end when asked", child.name()),
            }
        }
    }
}

impl Backend {
    async fn ready(&mut self) -> Result<(), BackendError> {
        let name = self.child.name().to_owned();
        let mut said = Vec::new();
        let read = timeout(READY_WITHIN, self.ready.read_buf(&mut said)).await;
        match read.map_err(|_elapsed| BackendError::NotReady(name))? {
            Ok(read) if read > 0 => Ok(()),
            // The pipe closes with the process, at the latest.
            _ => Err(self.ended().await),
        }
    }

    async fn ended(&self) -> BackendError {
        let name = self.child.name().to_owned();
        match self.child.ended().await {
            Ok(end) => BackendError::Ended { name, end, last_words: self.child.last_words() },
            Err(source) => BackendError::Child(ChildError::Watch { name, source }),
        }
    }
}

fn start(
    device: &DevicePlan,
    surroundings: Surroundings<'_>,
    network: Option<&Network>,
) -> Result<(Backend, VmmEnd), BackendError> {
    let (program, kind) = match device {
        DevicePlan::Vsock { .. } => ("nacre-vsock", "vsock"),
        DevicePlan::Share { .. } => ("nacre-fs", "fs"),
        DevicePlan::Disk { .. } => ("nacre-blk", "blk"),
        DevicePlan::Network => ("nacre-net", "net"),
    };
    let id = device.id().to_owned();
    let name = format!("{program} of `{id}`");
    let failed = |source: io::Error| BackendError::Socket { name: name.clone(), source };
    let (ours, socket) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|error| failed(error.into()))?;
    let (ready, ready_in_child) = io::pipe().map_err(failed)?;
    let mut launch = surroundings.launch(&name, program)?;
    let socket_number = launch.hand_in(ours);
    let ready_number = launch.hand_in(ready_in_child.into());
    launch = launch.args([
        "--fd".to_owned(),
        socket_number.to_string(),
        "--ready-fd".to_owned(),
        ready_number.to_string(),
    ]);
    if let (DevicePlan::Network, Some(network)) = (device, network) {
        let tap = launch.hand_in(network.tap.try_clone().map_err(failed)?);
        launch = launch.args([
            "--tap-fd".to_owned(),
            tap.to_string(),
            "--mac".to_owned(),
            network.pair.mac(),
        ]);
    }
    let launch = launch.args(arguments(device, surroundings.files));
    let child = launch.start(&surroundings.files.child_log(&id))?;
    let ready = pipe::Receiver::from_owned_fd(ready.into()).map_err(failed)?;
    let config = config_space(device, network);
    Ok((Backend { child, ready }, VmmEnd { id, kind, config, socket }))
}

/// What is known here of a device's configuration space (virtio 1.3, sections 5.1.4 and 5.11.4).
fn config_space(device: &DevicePlan, network: Option<&Network>) -> Vec<u8> {
    match (device, network) {
        (DevicePlan::Share { tag, .. }, _) => {
            let mut bytes = tag.as_bytes().to_vec();
            bytes.resize(FS_TAG_BYTES, 0);
            bytes.extend(1_u32.to_le_bytes());
            bytes
        }
        (DevicePlan::Network, Some(network)) => {
            let (link_up, pairs, mtu) = (1_u16, 1_u16, 0_u16);
            let mut bytes = network.pair.mac_bytes().to_vec();
            bytes.extend([link_up, pairs, mtu].map(u16::to_le_bytes).as_flattened());
            bytes
        }
        _ => Vec::new(),
    }
}

fn arguments(device: &DevicePlan, files: &SandboxFiles) -> Vec<OsString> {
    let path = |path: &PathBuf| path.clone().into_os_string();
    let (mut arguments, read_only): (Vec<OsString>, bool) = match device {
        DevicePlan::Vsock { cid } => {
            let socket = files.vsock().into_os_string();
            (vec!["--guest-cid".into(), cid.to_string().into(), "--uds-path".into(), socket], false)
        }
        DevicePlan::Share { tag, path: folder, read_only } => {
            let arguments = vec!["--shared-dir".into(), path(folder), "--tag".into(), tag.into()];
            (arguments, *read_only)
        }
        DevicePlan::Disk { serial, path: file, read_only } => {
            let arguments = vec!["--disk".into(), path(file), "--serial".into(), serial.into()];
            (arguments, *read_only)
        }
        DevicePlan::Network => (Vec::new(), false),
    };
    if read_only {
        arguments.push("--read-only".into());
    }
    arguments
}

#[cfg(test)]
#[path = "backends_tests.rs"]
mod tests;
