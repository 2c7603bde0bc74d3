//! All containers of the guest, by name, and what can be done with them.
//!
//! Each name is in one slot from the beginning of its creation to the end of its deletion, so that
//! no two requests make or remove the same container.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::Value;
use tokio::sync::oneshot;
use ttrpc::Code;

use crate::{
    cgroup::{Cgroup, CgroupError, limits::LimitError},
    container::{
        memory::{Killings, Watch},
        spec::SpecError,
        start::Pending,
    },
    devices::function::FunctionError,
    events::Events,
    holder::HolderError,
    ids::{ContainerId, ExecId, IdError, ProcessId},
    launch::spawn::{Launch, LaunchError},
    process::{
        Process, ProcessError,
        reap::{FollowError, Reaper},
        state::{Event, Exit, IllegalEvent, Live},
    },
    sandbox::{disks::DiskError, storage::StorageError},
};

mod added;
mod capabilities;
mod create;
mod delete;
mod exec;
mod limits;
mod memory;
mod namespaces;
pub(crate) mod spec;
mod start;

pub(crate) use create::NewContainer;
pub(crate) use exec::NewProcess;
pub(crate) use namespaces::NamespaceRequest;

/// The most containers at a time.
const CONTAINERS_MAX: usize = 512;
/// The most added processes of a container at a time.
const ADDED_MAX: usize = 1024;

/// Why something can't be done with a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    /// A name that is none.
    #[error("not a name")]
    Id(#[from] IdError),
    /// Nothing of this name.
    #[error("{0} not found")]
    NotFound(ProcessId),
    /// The name is taken.
    #[error("{0} exists already")]
    Exists(ProcessId),
    /// Being created or deleted by another request.
    #[error("container {0} is being created or deleted")]
    Busy(ContainerId),
    /// A limit of the agent.
    #[error("at most {max} {what} are possible at a time")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        max: usize,
    },
    /// The guest is about to power off.
    #[error("the guest is shutting down")]
    ShuttingDown,
    /// The init must run for this.
    #[error("container {0} is not running")]
    NotRunning(ContainerId),
    /// Its processes are stopped.
    #[error("container {0} is paused")]
    Paused(ContainerId),
    /// Its processes are not stopped.
    #[error("container {0} is not paused")]
    NotPaused(ContainerId),
    /// The process must have ended for this.
    #[error("{0} has not ended")]
    NotEnded(ProcessId),
    /// The specification.
    #[error("can't use the specification")]
    Spec(#[from] SpecError),
    /// A disk.
    #[error("can't find a disk")]
    Disk(#[from] DiskError),
    /// A device of the host's.
    #[error("can't use a device of the host's")]
    Function(#[from] FunctionError),
    /// The control group.
    #[error("can't use the control group")]
    Cgroup(#[from] CgroupError),
    /// A namespace that is to be shared.
    #[error("can't share a PID namespace")]
    Holder(#[from] HolderError),
    /// What is mounted for it.
    #[error("can't mount its storages")]
    Storage(#[from] StorageError),
    /// Its memory.
    #[error("can't watch its memory")]
    Watch(#[source] io::Error),
    /// Pipes or terminals.
    #[error("can't make the streams")]
    Streams(#[source] io::Error),
    /// A file of the agent's own.
    #[error("can't use {path:?}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The new process.
    #[error("can't follow the new process")]
    Follow(#[from] FollowError),
    /// The process.
    #[error("{id}")]
    Process {
        /// Whose.
        id: ProcessId,
        /// Why not.
        #[source]
        source: ProcessError,
    },
    /// The launch.
    #[error("can't run {what}")]
    Launch {
        /// Which program.
        what: String,
        /// Why not.
        #[source]
        source: LaunchError,
    },
}

impl ContainerError {
    /// What the host is told apart from the words.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Id(_)
            | Self::Spec(
                SpecError::Parse(_)
                | SpecError::Invalid { .. }
                | SpecError::Limits(LimitError::Invalid { .. }),
            ) => Code::INVALID_ARGUMENT,
            Self::Spec(
                SpecError::Unsupported(_) | SpecError::Limits(LimitError::Unsupported(_)),
            ) => Code::UNIMPLEMENTED,
            Self::Spec(SpecError::TooLarge(_)) | Self::TooMany { .. } => Code::RESOURCE_EXHAUSTED,
            Self::Spec(SpecError::Missing(_)) => Code::INVALID_ARGUMENT,
            Self::Function(FunctionError::Address(_) | FunctionError::TooMany(_)) => {
                Code::INVALID_ARGUMENT
            }
            Self::Function(_) => Code::UNAVAILABLE,
            Self::Storage(StorageError::Invalid { .. } | StorageError::TooMany(_)) => {
                Code::INVALID_ARGUMENT
            }
            Self::NotFound(_)
            | Self::Disk(_)
            | Self::Storage(StorageError::Disk(DiskError::NoDisk { .. })) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Busy(_)
            | Self::ShuttingDown
            | Self::NotRunning(_)
            | Self::Paused(_)
            | Self::NotPaused(_)
            | Self::NotEnded(_) => Code::FAILED_PRECONDITION,
            Self::Process { source, .. } => process_code(source),
            Self::Launch { source: LaunchError::NoProgram, .. } => Code::NOT_FOUND,
            Self::Launch { source: LaunchError::NotExecutable(_), .. } => Code::PERMISSION_DENIED,
            Self::Launch { source: LaunchError::Limit, .. } => Code::DEADLINE_EXCEEDED,
            Self::Cgroup(_)
            | Self::Holder(_)
            | Self::Storage(_)
            | Self::Watch(_)
            | Self::Streams(_)
            | Self::File { .. }
            | Self::Follow(_)
            | Self::Launch { .. } => Code::INTERNAL,
        }
    }
}

fn process_code(error: &ProcessError) -> Code {
    match error {
        ProcessError::Ended => Code::NOT_FOUND,
        ProcessError::State(_) | ProcessError::NotStarted | ProcessError::NoTerminal => {
            Code::FAILED_PRECONDITION
        }
        ProcessError::Signal { .. } => Code::INVALID_ARGUMENT,
        ProcessError::Terminal(_) => Code::INTERNAL,
    }
}

/// Adds whose process it is to an error.
fn of(id: &ProcessId) -> impl FnOnce(ProcessError) -> ContainerError {
    let id = id.clone();
    move |source| ContainerError::Process { id, source }
}

fn illegal(id: &ProcessId) -> impl FnOnce(IllegalEvent) -> ContainerError {
    let id = id.clone();
    move |event| ContainerError::Process { id, source: event.into() }
}

/// A container whose init exists.
#[derive(Debug)]
struct Container {
    bundle: PathBuf,
    cgroup: Arc<Cgroup>,
    killings: Arc<Killings>,
    /// Ends with the container.
    _watch: Watch,
    /// The host's `process` object, which added processes inherit from.
    base: Value,
    /// Whether its processes run under a seccomp filter.
    filtered: bool,
    init: Arc<Process>,
    /// The launch that holds the init before its execve.
    launch: Launch,
    /// What the init is to run, for messages.
    program: String,
    /// Added processes; locked for map operations only.
    added: Mutex<HashMap<ExecId, AddedProcess>>,
}

#[derive(Clone, Debug)]
struct AddedProcess {
    process: Arc<Process>,
    /// What its start needs; taken by it.
    pending: Arc<Mutex<Option<Pending>>>,
}

#[derive(Debug)]
enum Slot {
    /// Being created or deleted.
    Busy,
    Here(Arc<Container>),
}

#[derive(Debug, Default)]
struct Slots {
    by_id: HashMap<ContainerId, Slot>,
    /// No container is created any more.
    closed: bool,
}

/// All containers.
#[derive(Debug)]
pub(crate) struct Containers {
    reaper: Arc<Reaper>,
    events: Arc<Events>,
    /// The first process of the sandbox's own PID namespace, once there is one; locked while it is
    /// made.
    holder: Mutex<Option<Live>>,
    /// Locked for map operations only.
    slots: Mutex<Slots>,
}

impl Containers {
    /// No containers; their processes will be reaped by `reaper`.
    pub(crate) fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            events: Arc::new(Events::new()),
            holder: Mutex::default(),
            slots: Mutex::default(),
        }
    }

    /// What happens in them.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// The process of this name.
    pub(crate) fn process(&self, id: &ProcessId) -> Result<Arc<Process>, ContainerError> {
        let container = self.container(&id.container)?;
        match &id.exec {
            None => Ok(Arc::clone(&container.init)),
            Some(exec) => {
                let added = lock(&container.added).get(exec).cloned();
                Ok(added.ok_or_else(|| ContainerError::NotFound(id.clone()))?.process)
            }
        }
    }

    /// Sends a signal to one process, or to all of a container.
    pub(crate) fn signal(
        &self,
        id: &ProcessId,
        signal: i32,
        all: bool,
    ) -> Result<(), ContainerError> {
        let process = self.process(id)?;
        if all && id.exec.is_none() {
            if process.exit().is_some() {
                return Err(of(id)(ProcessError::Ended));
            }
            return Ok(self.container(&id.container)?.cgroup.signal_all(signal)?);
        }
        process.signal(signal).map_err(of(id))
    }

    /// The init of a container whose program runs.
    ///
    /// # Errors
    ///
    /// Fails if there is no such container or its program does not run.
    pub(crate) fn running_init(&self, id: &ContainerId) -> Result<Live, ContainerError> {
        let container = self.container(id)?;
        let live = container.init.live().filter(|_live| container.init.is_running());
        live.ok_or_else(|| ContainerError::NotRunning(id.clone()))
    }

    /// Lets a container use a disk that it is given while it runs.
    pub(crate) fn allow_disk(
        &self,
        id: &ContainerId,
        number: (u32, u32),
    ) -> Result<(), ContainerError> {
        Ok(self.container(id)?.cgroup.allow_disk(number)?)
    }

    /// Refuses to create more, and gives the control groups and inits of those that are there.
    pub(crate) fn close(&self) -> Vec<(Arc<Cgroup>, Arc<Process>)> {
        let mut slots = self.slots();
        slots.closed = true;
        let here = |slot: &Slot| match slot {
            Slot::Busy => None,
            Slot::Here(container) => {
                Some((Arc::clone(&container.cgroup), Arc::clone(&container.init)))
            }
        };
        slots.by_id.values().filter_map(here).collect()
    }

    fn container(&self, id: &ContainerId) -> Result<Arc<Container>, ContainerError> {
        match self.slots().by_id.get(id) {
            Some(Slot::Here(container)) => Ok(Arc::clone(container)),
            Some(Slot::Busy) => Err(ContainerError::Busy(id.clone())),
            None => Err(ContainerError::NotFound(init_of(id))),
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }
}

fn init_of(id: &ContainerId) -> ProcessId {
    ProcessId { container: id.clone(), exec: None }
}

/// Map operations don't panic half-way, so a poisoned lock has a sound map in it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a process's end and records it.
fn record_end(process: Arc<Process>, killings: Arc<Killings>, end: oneshot::Receiver<Exit>) {
    tokio::spawn(async move {
        let Ok(mut exit) = end.await else {
            log::error!("the end of {} got lost", process.id);
            return;
        };
        // What the killer did is told before the end that it caused.
        exit.oom_killed = killings.look();
        if process.id.exec.is_none() {
            // The kernel ends the others only in a PID namespace that was the init's own.
            killings.end_group().await;
        }
        if let Err(error) = process.apply(Event::Ended(exit)) {
            log::error!("{} ended twice: {error}", process.id);
        }
    });
}
