//! The devices of a guest, each with a process of its own, and what is mounted of them. Pure.

use std::path::PathBuf;

use nacre_proto::agent::{Device, Storage};

use crate::plan::{
    ContainerConfig, Contents, Disk, GUEST, NetworkConfig, POD, POD_MEMORY, SandboxConfig,
};

/// A device of the guest, and so one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DevicePlan {
    /// `nacre-vsock`.
    Vsock {
        /// The guest's address; each VM has its own socket, so the number need not be unique.
        cid: u32,
    },
    /// `nacre-fs`.
    Share {
        /// The tag, also the device's id.
        tag: String,
        /// The folder.
        path: PathBuf,
        /// Whether the guest may only read it.
        read_only: bool,
        /// Where the container sees it; none: it is below the root of all that runs in the guest.
        place: Option<PathBuf>,
        /// Whether other file systems are mounted in it, which come and go: the guest is told of
        /// them, and of extended attributes.
        submounts: bool,
    },
    /// `nacre-blk`.
    Disk {
        /// The serial, also the device's id.
        serial: String,
        /// The image.
        path: PathBuf,
        /// Whether it may only be read.
        read_only: bool,
    },
    /// `nacre-net`.
    Network {
        /// The device's id.
        id: String,
        /// What the guest calls it.
        interface: String,
    },
}

impl DevicePlan {
    /// The network interface number `index`.
    #[must_use]
    pub fn nic(index: usize) -> Self {
        Self::Network { id: nic_id(index), interface: format!("eth{index}") }
    }

    /// The device's id for the VMM and for messages.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Vsock { .. } => "vsock",
            Self::Share { tag, .. } => tag,
            Self::Disk { serial, .. } => serial,
            Self::Network { id, .. } => id,
        }
    }
}

/// The id of the network interface number `index`.
pub(crate) fn nic_id(index: usize) -> String {
    if index == 0 { "net".to_owned() } else { format!("net-{index}") }
}

/// The devices that the guest begins with.
pub(super) fn devices(config: &SandboxConfig) -> Vec<DevicePlan> {
    let nics: Vec<DevicePlan> = match &config.network {
        NetworkConfig::None => Vec::new(),
        NetworkConfig::Own => vec![DevicePlan::nic(0)],
        NetworkConfig::Namespace { found, .. } => {
            let named = found.interfaces.iter().enumerate();
            named
                .map(|(index, interface)| DevicePlan::Network {
                    id: nic_id(index),
                    interface: interface.name.clone(),
                })
                .collect()
        }
    };
    let others = match &config.contents {
        Contents::Container(container) => shares_and_disks(container),
        Contents::Pod { shared, .. } => vec![DevicePlan::Share {
            tag: POD.to_owned(),
            path: shared.clone(),
            read_only: false,
            place: None,
            submounts: true,
        }],
    };
    [DevicePlan::Vsock { cid: 3 }].into_iter().chain(others).chain(nics).collect()
}

fn shares_and_disks(container: &ContainerConfig) -> Vec<DevicePlan> {
    let rootfs = DevicePlan::Share {
        tag: "rootfs".to_owned(),
        path: container.rootfs.clone(),
        read_only: !container.writable_rootfs,
        place: None,
        submounts: false,
    };
    let volumes = container.volumes.iter().enumerate().map(|(index, volume)| DevicePlan::Share {
        tag: format!("volume-{index}"),
        path: volume.host.clone(),
        read_only: volume.read_only,
        place: Some(volume.guest.clone()),
        submounts: false,
    });
    let disks = container.disks.iter().enumerate().map(|(index, disk)| DevicePlan::Disk {
        serial: format!("disk-{index}"),
        path: disk.path.clone(),
        read_only: disk.read_only,
    });
    [rootfs].into_iter().chain(volumes).chain(disks).collect()
}

/// Where a pod's share is mounted in the guest.
pub(crate) fn guest_pod() -> String {
    format!("{GUEST}/{POD}")
}

/// Where a volume is mounted in the guest.
pub(crate) fn mount_point(tag: &str) -> String {
    format!("{GUEST}/volumes/{}", tag.strip_prefix("volume-").unwrap_or(tag))
}

/// What the agent mounts before any container is made, in order.
pub(super) fn storages(contents: &Contents) -> Vec<Storage> {
    let share = |tag: String, mount_point: String, read_only: bool| Storage {
        driver: "virtiofs".to_owned(),
        source: tag,
        options: if read_only { vec!["ro".to_owned()] } else { Vec::new() },
        mount_point,
        ..Storage::default()
    };
    let container = match contents {
        Contents::Pod { .. } => {
            return vec![share(POD.to_owned(), guest_pod(), false), shared_memory()];
        }
        Contents::Container(container) => container,
    };
    let lower = format!("{GUEST}/lower");
    let rootfs = format!("{GUEST}/rootfs");
    let mut storages = if container.writable_rootfs {
        vec![share("rootfs".to_owned(), rootfs, false)]
    } else {
        let overlay = Storage {
            driver: "overlay".to_owned(),
            source: lower.clone(),
            mount_point: rootfs,
            ..Storage::default()
        };
        vec![share("rootfs".to_owned(), lower, true), overlay]
    };
    storages.extend(container.volumes.iter().enumerate().map(|(index, volume)| {
        let tag = format!("volume-{index}");
        let mount_point = mount_point(&tag);
        share(tag, mount_point, volume.read_only)
    }));
    storages
}

/// What a pod's containers have as /dev/shm together.
fn shared_memory() -> Storage {
    Storage {
        driver: "tmpfs".to_owned(),
        source: "shm".to_owned(),
        options: ["nosuid", "nodev", "noexec", "mode=1777", "size=65536k"]
            .map(str::to_owned)
            .into(),
        mount_point: POD_MEMORY.to_owned(),
        ..Storage::default()
    }
}

/// The disks as device nodes of their container.
pub(super) fn container_devices(disks: &[Disk]) -> Vec<Device> {
    let device = |(index, disk): (usize, &Disk)| Device {
        serial: format!("disk-{index}"),
        container_path: format!("/dev/disk-{index}"),
        read_only: disk.read_only,
        ..Device::default()
    };
    disks.iter().enumerate().map(device).collect()
}
