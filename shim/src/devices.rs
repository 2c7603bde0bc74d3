//! Asking a sandbox's supervisor about its devices and for changes, from another process.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use nacre_proto::{
    supervisor::{Answer, Device, NewDevice, Request, Resources},
    vmm::{self, MessageError},
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::time::timeout;

use crate::packets::Packets;

/// How long a supervisor may take to list its devices.
const LISTED_WITHIN: Duration = Duration::from_secs(20);
/// How long it may take to replace a process: it waits for what the device has in flight, and
/// perhaps for two programs in a row.
const REPLACED_WITHIN: Duration = Duration::from_secs(300);
/// How long it may take to change what the guest has: it waits for the guest, several times, and
/// each of its waits has a limit.
const CHANGED_WITHIN: Duration = Duration::from_secs(900);

/// Why a supervisor's devices can't be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Nobody listens, or does not answer.
    #[error("the supervisor can't be asked at {}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It answers nonsense.
    #[error("the supervisor's answer is malformed")]
    Answer(#[from] MessageError),
    /// It answers something else.
    #[error("the supervisor answers something else")]
    OtherAnswer,
    /// Nothing was done.
    #[error("{0}")]
    Refused(String),
    /// The new program does not serve.
    #[error("the new program does not serve ({0}); the old one does again")]
    FellBack(String),
    /// No program serves.
    #[error("the device is not served yet ({0}); its supervisor goes on trying")]
    NotBack(String),
    /// The guest does not give the device up.
    #[error("the device stays: {0}")]
    Kept(String),
    /// It is not known whether the device goes.
    #[error("{0}")]
    Leaving(String),
}

/// The devices of the supervisor that listens at `socket`.
///
/// # Errors
///
/// Fails if there is none or it does not answer.
pub async fn list(socket: &Path) -> Result<Vec<Device>, DeviceError> {
    match ask(socket, &Request::ListDevices, LISTED_WITHIN).await? {
        Answer::Devices(devices) => Ok(devices),
        Answer::Refused(why) => Err(DeviceError::Refused(why)),
        _ => Err(DeviceError::OtherAnswer),
    }
}

/// Replaces the process of `device`, by one of `program` if one is given. Answers for how many
/// milliseconds there was none.
///
/// # Errors
///
/// Fails if it was not replaced as asked.
pub async fn replace(
    socket: &Path,
    device: String,
    program: Option<String>,
) -> Result<u64, DeviceError> {
    let request = Request::ReplaceDevice { device, program };
    match ask(socket, &request, REPLACED_WITHIN).await? {
        Answer::Replaced { unserved_ms } => Ok(unserved_ms),
        Answer::Refused(why) => Err(DeviceError::Refused(why)),
        Answer::FellBack(why) => Err(DeviceError::FellBack(why)),
        Answer::NotBack(why) => Err(DeviceError::NotBack(why)),
        _ => Err(DeviceError::OtherAnswer),
    }
}

/// Gives the guest other amounts of processors and memory; answers what it has then, and why that
/// is not as asked if it is not.
///
/// # Errors
///
/// Fails if nothing was done.
pub async fn resize(
    socket: &Path,
    cpus: Option<u32>,
    memory_bytes: Option<u64>,
) -> Result<(Resources, Option<String>), DeviceError> {
    match ask(socket, &Request::Resize { cpus, memory_bytes }, CHANGED_WITHIN).await? {
        Answer::Resized(now) => Ok((now, None)),
        Answer::PartlyResized { now, why } => Ok((now, Some(why))),
        Answer::Refused(why) => Err(DeviceError::Refused(why)),
        _ => Err(DeviceError::OtherAnswer),
    }
}

/// A device that a sandbox was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// Its id.
    pub device: String,
    /// Where it is on the guest's PCI bus.
    pub address: String,
    /// What the container knows it by.
    pub places: Vec<String>,
}

/// Gives a sandbox another device.
///
/// # Errors
///
/// Fails if the container does not have it.
pub async fn add(socket: &Path, new: NewDevice) -> Result<Added, DeviceError> {
    match ask(socket, &Request::AddDevice(new), CHANGED_WITHIN).await? {
        Answer::Added { device, address, places } => Ok(Added { device, address, places }),
        Answer::Leaving(why) => Err(DeviceError::Leaving(why)),
        Answer::Refused(why) => Err(DeviceError::Refused(why)),
        _ => Err(DeviceError::OtherAnswer),
    }
}

/// Takes a device from a sandbox.
///
/// # Errors
///
/// Fails if it is not gone.
pub async fn remove(socket: &Path, device: String) -> Result<(), DeviceError> {
    match ask(socket, &Request::RemoveDevice { device }, CHANGED_WITHIN).await? {
        Answer::Removed => Ok(()),
        Answer::Kept(why) => Err(DeviceError::Kept(why)),
        Answer::Leaving(why) => Err(DeviceError::Leaving(why)),
        Answer::Refused(why) => Err(DeviceError::Refused(why)),
        _ => Err(DeviceError::OtherAnswer),
    }
}

async fn ask(path: &Path, request: &Request, limit: Duration) -> Result<Answer, DeviceError> {
    let failed = |source| DeviceError::Socket { path: path.to_owned(), source };
    let request = vmm::encode(request)?;
    let mut buffer = vec![0; vmm::MAX_BYTES];
    let exchange = async {
        let supervisor = open(path)?;
        supervisor.send(&request, &[]).await?;
        supervisor.receive(&mut buffer).await
    };
    let elapsed = |_elapsed| failed(io::ErrorKind::TimedOut.into());
    let received = timeout(limit, exchange).await.map_err(elapsed)?.map_err(failed)?;
    if received.len_bytes == 0 {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(vmm::decode(&buffer[..received.len_bytes])?)
}

fn open(path: &Path) -> io::Result<Packets> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Packets::new(socket)
}
