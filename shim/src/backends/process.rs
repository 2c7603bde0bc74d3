//! One process of a device: how it is started, becomes ready, and is waited for.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::Signal,
};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use crate::{
    backends::{
        BackendError, VmmEnd,
        estate::{Counter, Estate},
        kind::{self, Role},
    },
    cgroup::{Cgroup, CgroupError},
    child::{Child, ChildError, End, Launch},
    network::Nic,
    paths::SandboxFiles,
    plan::DevicePlan,
};

/// What every process of a sandbox is started with.
#[derive(Clone, Debug)]
pub struct Surroundings {
    programs: PathBuf,
    pub(crate) files: SandboxFiles,
    /// `cgroup.procs` of the sandbox's cgroup on the host, if it has limits there.
    procs: Option<Arc<OwnedFd>>,
    log_level: log::LevelFilter,
}

impl Surroundings {
    /// Processes out of the folder `programs`.
    #[must_use]
    pub fn new(programs: PathBuf, files: SandboxFiles, log_level: log::LevelFilter) -> Self {
        Self { programs, files, procs: None, log_level }
    }

    /// Lets all processes join `cgroup`.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn within(mut self, cgroup: Option<&Cgroup>) -> Result<Self, CgroupError> {
        self.procs = cgroup.map(Cgroup::procs).transpose()?.map(Arc::new);
        Ok(self)
    }

    /// Where `program` is.
    pub(crate) fn path_of(&self, program: &str) -> PathBuf {
        self.programs.join(program)
    }

    /// A launch of `program`, called `name`.
    pub(crate) fn launch(&self, name: &str, program: &Path) -> io::Result<Launch> {
        let procs = self.procs.as_ref().map(|procs| procs.try_clone()).transpose()?;
        let level = self.log_level.as_str().to_ascii_lowercase();
        Ok(Launch::new(name, program.to_owned())
            .args(["--log-level", level.as_str()])
            .cgroup(procs))
    }
}

/// All that is needed to start a process for a device, any number of times.
#[derive(Debug)]
pub(super) struct Blueprint {
    pub(super) device: DevicePlan,
    /// What it is called in messages.
    pub(super) name: String,
    surroundings: Surroundings,
    /// The tap, which stays as long as it is open here, and the guest's address.
    nic: Option<(OwnedFd, String)>,
}

/// A process of a device. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) counter: Counter,
    pub(super) ready: pipe::Receiver,
}

impl Blueprint {
    pub(super) fn new(
        device: &DevicePlan,
        surroundings: Surroundings,
        nic: Option<&Nic>,
    ) -> Result<Self, BackendError> {
        let name = format!("{} of `{}`", device.program(), device.id());
        let nic = match (device, nic) {
            (DevicePlan::Network { .. }, Some(nic)) => {
                let tap = nic.tap.try_clone();
                let prepare = |source| BackendError::Prepare { name: name.clone(), source };
                Some((tap.map_err(prepare)?, nic.mac()))
            }
            _ => None,
        };
        Ok(Self { device: device.clone(), name, surroundings, nic })
    }

    /// The program of the device's first process.
    pub(super) fn program(&self) -> PathBuf {
        self.surroundings.path_of(self.device.program())
    }

    /// The VMM's end of a first process.
    pub(super) fn vmm_end(&self, nic: Option<&Nic>, socket: OwnedFd) -> VmmEnd {
        VmmEnd {
            id: self.device.id().to_owned(),
            kind: self.device.kind(),
            config: kind::config_space(&self.device, nic),
            socket,
        }
    }

    pub(super) fn prepare(&self) -> impl Fn(io::Error) -> BackendError {
        |source| BackendError::Prepare { name: self.name.clone(), source }
    }

    /// Starts a process for the device out of `program`; also the socket for the VMM. What the store
    /// holds is yet to be handed over.
    pub(super) fn start(
        &self,
        program: &Path,
        estate: &Estate,
        role: Role,
    ) -> Result<(Process, OwnedFd), BackendError> {
        let prepare = self.prepare();
        let (ours, socket) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|error| prepare(error.into()))?;
        let (ready, ready_in_child) = io::pipe().map_err(&prepare)?;
        let (counter, store) = Counter::open().map_err(&prepare)?;
        let mut launch = self.surroundings.launch(&self.name, program).map_err(&prepare)?;
        for (option, fd) in [
            ("--fd", ours),
            ("--ready-fd", ready_in_child.into()),
            ("--state-fd", estate.state().map_err(&prepare)?),
            ("--store-fd", store),
        ] {
            let number = launch.hand_in(fd);
            launch = launch.args([option.to_owned(), number.to_string()]);
        }
        if let Some((tap, mac)) = &self.nic {
            let number = launch.hand_in(tap.try_clone().map_err(&prepare)?);
            launch = launch.args(["--tap-fd", &number.to_string(), "--mac", mac]);
        }
        let files = &self.surroundings.files;
        let launch = launch
            .args(kind::arguments(&self.device, files))
            .args(role.arguments(&self.device).iter().copied());
        let child = launch.start(&files.child_log(self.device.id()))?;
        let ready = pipe::Receiver::from_owned_fd(ready.into()).map_err(&prepare)?;
        Ok((Process { child, counter, ready }, socket))
    }
}

impl Process {
    /// Asks it to end, and makes it after `grace`. Answers once it is gone and all that it left
    /// is in `estate`.
    pub(super) async fn end(
        self,
        signal: Signal,
        grace: Duration,
        estate: &mut Estate,
    ) -> Option<End> {
        self.child.signal(signal);
        if self.child.ended_within(grace).await.is_none() {
            self.child.signal(Signal::KILL);
        }
        self.gone(estate).await
    }

    /// Waits until it and its process group are gone and takes in all that it left.
    pub(super) async fn gone(self, estate: &mut Estate) -> Option<End> {
        let Self { child, counter, ready } = self;
        let end = child.ended().await;
        drop((child, ready));
        if let Err(fault) = estate.take_rest(counter) {
            log::warn!("the last that a backend left is not kept: {fault}");
        }
        end.ok()
    }
}

/// Waits until a backend says that it is ready.
pub(super) async fn ready(
    child: &Child,
    pipe: &mut pipe::Receiver,
    limit: Duration,
) -> Result<(), BackendError> {
    let mut said = Vec::new();
    let read = timeout(limit, pipe.read_buf(&mut said)).await;
    match read.map_err(|_elapsed| BackendError::NotReady(child.name().to_owned()))? {
        Ok(read) if read > 0 => Ok(()),
        // The pipe closes with the process, at the latest.
        _ => Err(how_ended(child).await),
    }
}

/// Waits for the end of a backend, and says how that was.
pub(super) async fn how_ended(child: &Child) -> BackendError {
    let name = child.name().to_owned();
    match child.ended().await {
        Ok(end) => BackendError::Ended { name, end, last_words: child.last_words() },
        Err(source) => BackendError::Child(ChildError::Watch { name, source }),
    }
}
