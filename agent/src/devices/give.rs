//! Giving a device to a running container, and taking it back.
//!
//! Nodes and mounts are the container's own; interfaces are the guest's, which its containers share.
//! Whether a container may open a node is a matter of the node's mode: there is no device controller
//! in the guest (libcontainer is built without it), so nothing else has to be told.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nacre_proto::pci::PciAddress;
use tokio::{
    task::{JoinError, spawn_blocking},
    time::sleep,
};
use ttrpc::Code;

use crate::{
    container::{ContainerError, Containers, spec::DiskNode},
    devices::{
        found::{self, DeviceError, Part},
        function::{self, FunctionError, FunctionRequest},
        inside::Inside,
        order::{Order, Use},
        users::{self, User},
    },
    sandbox::{
        disks::{self, DiskError},
        network::{Network, NetworkError},
        storage::{StorageError, StoragePlan},
    },
};

/// How long a device may take to be of use after the host added it.
const APPEAR_LIMIT: Duration = Duration::from_secs(30);
/// The pause between two attempts to mount a share whose driver is not through yet.
const MOUNT_AGAIN: Duration = Duration::from_millis(20);
/// How long those may go on.
const MOUNT_LIMIT: Duration = Duration::from_secs(5);

/// Why a device was not given, or not taken back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GiveError {
    /// Makes no sense.
    #[error("{what} {value:?}")]
    Invalid {
        /// What.
        what: &'static str,
        /// As given.
        value: String,
    },
    /// The container.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// It did not come.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It is the host's, and not of use.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// It came as several.
    #[error("the device at {0} is several disks")]
    Several(PciAddress),
    /// Somebody uses it.
    #[error("the disk {name} is in use: {}", by.as_ref().map_or_else(
        || "it is mounted, or part of another device".to_owned(),
        |process| format!("process {process} has it open")
    ))]
    InUse {
        /// Which.
        name: String,
        /// By a process of the guest; none: by the kernel.
        by: Option<String>,
    },
    /// Somebody uses it.
    #[error("the share at {0:?} is in use")]
    ShareInUse(PathBuf),
    /// The disk.
    #[error("can't use the disk")]
    Disk(#[from] DiskError),
    /// The share.
    #[error("can't use the share")]
    Storage(#[from] StorageError),
    /// The interface.
    #[error("can't use the interface")]
    Network(#[from] NetworkError),
    /// The container's files.
    #[error("can't {verb} {path:?} of the container")]
    Inside {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The work was given up.
    #[error("the work was cut short")]
    Cut(#[source] JoinError),
}

impl GiveError {
    /// What the host is told apart from the words.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Several(_) => Code::INVALID_ARGUMENT,
            Self::Container(error) => error.code(),
            Self::Function(FunctionError::Address(_) | FunctionError::TooMany(_)) => {
                Code::INVALID_ARGUMENT
            }
            Self::Device(_) | Self::Function(_) => Code::NOT_FOUND,
            Self::InUse { .. } | Self::ShareInUse(_) => Code::FAILED_PRECONDITION,
            Self::Disk(_)
            | Self::Storage(_)
            | Self::Network(_)
            | Self::Inside { .. }
            | Self::Cut(_) => Code::INTERNAL,
        }
    }
}

/// Gives the device; answers what the container knows it by.
pub(crate) async fn give(containers: &Containers, order: Order) -> Result<Vec<String>, GiveError> {
    let inside = inside(containers, &order)?;
    let Order { container, address, purpose } = order;
    match purpose {
        Use::Disk { path, read_only } => {
            let parts = found::appeared(address, &["block"], APPEAR_LIMIT).await?;
            let [Part { number: Some(number), .. }] = parts[..] else {
                return Err(GiveError::Several(address));
            };
            containers.allow_disk(&container, number)?;
            disk(inside, path, number, read_only).await.map(|path| vec![path])
        }
        Use::Share { storage, path } => {
            found::appeared(address, &["virtio"], APPEAR_LIMIT).await?;
            share(inside, *storage, path).await.map(|path| vec![path])
        }
        Use::Interface { network, name } => interface(address, network, name).await,
        Use::Function(request) => {
            let names = function(inside, address, request).await?;
            for number in found::now(address).iter().filter_map(|part| part.number) {
                containers.allow_disk(&container, number)?;
            }
            Ok(names)
        }
    }
}

/// Takes the device back, unless it is in use.
pub(crate) async fn take(containers: &Containers, order: Order) -> Result<(), GiveError> {
    let inside = inside(containers, &order)?;
    let parts = found::now(order.address);
    match order.purpose {
        Use::Disk { path, .. } => {
            blocking(move || take_disks(&inside, &parts, |_name| path.clone())).await
        }
        Use::Share { storage, path } => {
            blocking(move || take_share(&inside, &storage, &path)).await
        }
        // Whoever uses it finds the network gone.
        Use::Interface { .. } => Ok(()),
        Use::Function(_) => {
            let path = |name: &str| Path::new("/dev").join(name);
            blocking(move || take_disks(&inside, &parts, path)).await
        }
    }
}

fn inside(containers: &Containers, order: &Order) -> Result<Inside, GiveError> {
    let init = containers.running_init(&order.container)?;
    Inside::of(&init).map_err(failed("reach", Path::new("/")))
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GiveError {
    let path = path.to_path_buf();
    move |source| GiveError::Inside { verb, path, source }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, GiveError> + Send + 'static,
) -> Result<T, GiveError> {
    spawn_blocking(work).await.map_err(GiveError::Cut)?
}

async fn disk(
    inside: Inside,
    path: PathBuf,
    number: (u32, u32),
    read_only: bool,
) -> Result<String, GiveError> {
    blocking(move || {
        if read_only {
            let (major, minor) = number;
            disks::set_read_only(&DiskNode { path: path.clone(), major, minor, read_only })?;
        }
        inside.make_disk(&path, number, read_only).map_err(failed("make", &path))?;
        Ok(path.to_string_lossy().into_owned())
    })
    .await
}

async fn share(inside: Inside, storage: StoragePlan, path: PathBuf) -> Result<String, GiveError> {
    let deadline = Instant::now() + MOUNT_LIMIT;
    while let Err(error) = storage.mount().await {
        // The file system does not know the tag before its driver is through.
        if Instant::now() > deadline {
            return Err(error.into());
        }
        sleep(MOUNT_AGAIN).await;
    }
    blocking(move || {
        let given = inside.mount(storage.target(), &path).map_err(failed("mount on", &path));
        if given.is_err() {
            storage.unmount()?;
        }
        given.map(|()| path.to_string_lossy().into_owned())
    })
    .await
}

async fn interface(
    address: PciAddress,
    network: Network,
    name: String,
) -> Result<Vec<String>, GiveError> {
    found::appeared(address, &["net"], APPEAR_LIMIT).await?;
    network.apply().await?;
    Ok(vec![name])
}

async fn function(
    inside: Inside,
    address: PciAddress,
    request: FunctionRequest,
) -> Result<Vec<String>, GiveError> {
    let mut names = Vec::new();
    for node in function::nodes(&[request]).await? {
        let DiskNode { path, major, minor, read_only } = node;
        names.push(disk(inside.clone(), path, (major, minor), read_only).await?);
    }
    let interfaces = found::now(address).into_iter().filter(|part| part.subsystem == "net");
    names.extend(interfaces.map(|part| part.name));
    Ok(names)
}

fn take_disks(
    inside: &Inside,
    parts: &[Part],
    path: impl Fn(&str) -> PathBuf,
) -> Result<(), GiveError> {
    let disks = || parts.iter().filter(|part| part.subsystem == "block");
    for part in disks() {
        let Some(number) = part.number else { continue };
        let user = users::of_disk(&part.name, number);
        let by = match user.map_err(failed("look at", &Path::new("/dev").join(&part.name)))? {
            None => continue,
            Some(User::Kernel) => None,
            Some(User::Process(pid, name)) => Some(format!("{pid} ({name})")),
        };
        return Err(GiveError::InUse { name: part.name.clone(), by });
    }
    for part in disks() {
        let path = path(&part.name);
        inside.remove_disk(&path).map_err(failed("remove", &path))?;
    }
    Ok(())
}

fn take_share(inside: &Inside, storage: &StoragePlan, path: &Path) -> Result<(), GiveError> {
    let source = storage.target();
    let in_use = |error: io::Error, path: &Path| {
        if error.raw_os_error() == Some(libc::EBUSY) {
            GiveError::ShareInUse(path.to_path_buf())
        } else {
            failed("unmount", path)(error)
        }
    };
    inside.unmount(source, path).map_err(|error| in_use(error, path))?;
    if let Err(error) = storage.unmount() {
        // As it was.
        inside.mount(source, path).map_err(failed("mount on", path))?;
        return Err(error.into());
    }
    Ok(())
}
