//! The devices of the command line: their backends' sockets and the host's devices are opened here,
//! before the jail closes.

use std::os::unix::net::UnixStream;

use vfio::{Opened, Sysfs, group};

use super::DevicesError;
use crate::{
    config::{self, AssignedConfig, Endpoint},
    sys,
    virtio::{DeviceConfig, DeviceKind, Negotiated, Watchdog, connect_all},
};

/// Connects to all backends and negotiates with them, side by side.
///
/// # Errors
///
/// Fails if a backend can't be reached or does not fit.
pub fn connect_all_of(
    configs: &[config::DeviceConfig],
    watchdog: &Watchdog,
) -> Result<Vec<Negotiated>, DevicesError> {
    let sockets = configs
        .iter()
        .map(|config| Ok((wanted(config), open(config)?)))
        .collect::<Result<_, DevicesError>>()?;
    Ok(connect_all(sockets, watchdog)?)
}

fn wanted(config: &config::DeviceConfig) -> DeviceConfig {
    let queues = (config.queues, config.queue_size);
    virtio_config(&config.id, config.device_type, queues, config.config_space.clone())
}

/// What is wanted of the backend of a virtio device; `queues` are how many and how large, where
/// that was said.
#[must_use]
pub fn virtio_config(
    id: &str,
    device_type: u16,
    queues: (Option<u16>, Option<u16>),
    config_bytes: Option<Vec<u8>>,
) -> DeviceConfig {
    let mut wanted = DeviceConfig::new(id, DeviceKind(device_type));
    wanted.queues = queues.0;
    wanted.queue_size = queues.1.unwrap_or(wanted.queue_size);
    wanted.config_bytes = config_bytes;
    wanted
}

fn open(config: &config::DeviceConfig) -> Result<UnixStream, DevicesError> {
    let id = || config.id.clone();
    match &config.endpoint {
        Endpoint::Socket(path) => UnixStream::connect(path)
            .map_err(|source| DevicesError::Unreachable { id: id(), path: path.clone(), source }),
        Endpoint::Fd(fd) => sys::inherited_fd(*fd)
            .map(UnixStream::from)
            .map_err(|source| DevicesError::Descriptor { id: id(), fd: *fd, source }),
    }
}

/// A device of the host's, opened here or handed in.
///
/// # Errors
///
/// Fails if it can't be opened, or the descriptors are none.
pub fn open_assigned(config: &AssignedConfig) -> Result<Opened, DevicesError> {
    let id = || config.id.clone();
    let Some([container, group, device]) = config.fds else {
        return group::open(&Sysfs::default(), config.address)
            .map_err(|error| DevicesError::Assign { id: id(), source: error.into() });
    };
    let own = |fd| {
        sys::inherited_fd(fd).map_err(|source| DevicesError::Descriptor { id: id(), fd, source })
    };
    Ok(Opened { container: own(container)?, group: own(group)?, device: own(device)? })
}
