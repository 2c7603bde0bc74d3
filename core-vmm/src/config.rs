//! What a VM is to be, checked as far as it can be without touching the host.

use std::{os::fd::RawFd, path::PathBuf};

use vfio::HostAddress;

/// A whole VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// PVH ELF or bzImage.
    pub kernel: PathBuf,
    /// A cpio archive, compressed as the kernel can.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// vCPUs, at least 1.
    pub cpus: u32,
    /// The most vCPUs, at least as many.
    pub max_cpus: u32,
    /// RAM in bytes; may still be too much or too little.
    pub memory_bytes: u64,
    /// RAM in bytes that the VM can have by hotplug, at least `memory_bytes`; may still be too much.
    pub max_memory_bytes: u64,
    /// PCI segments, at least 1, each with room for 31 devices.
    pub pci_segments: u16,
    /// Devices in the order of their PCI slots; ids are unique.
    pub devices: Vec<DeviceConfig>,
    /// Devices of the host's, after the others; ids are unique among all.
    pub assigned: Vec<AssignedConfig>,
    /// The serial port.
    pub serial: SerialConfig,
    /// What a reset by the guest does.
    pub on_reset: OnReset,
    /// The supervisor's socket.
    pub control_fd: Option<RawFd>,
}

impl Config {
    /// Whether a device of the host's is there or may come.
    #[must_use]
    pub fn may_have_passthrough(&self) -> bool {
        !self.assigned.is_empty() || self.control_fd.is_some()
    }
}

/// What a reset by the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnReset {
    /// The guest boots again in this process.
    Restart,
    /// The process ends, with an exit code that says so.
    Exit,
}

/// The serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// No port.
    None,
    /// Standard input and output.
    Stdio,
    /// A descriptor that was handed in, for both directions.
    Fd(RawFd),
    /// Output to a file; no input.
    File(PathBuf),
}

/// A vhost-user device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The supervisor's name for it.
    pub id: String,
    /// Where its backend is.
    pub endpoint: Endpoint,
    /// The virtio device type, which vhost-user never tells.
    pub device_type: u16,
    /// How many queues, where the backend does not say.
    pub queues: Option<u16>,
    /// The size of each queue; the transport has a default.
    pub queue_size: Option<u16>,
    /// The configuration space, where the backend has none to give.
    pub config_space: Option<Vec<u8>>,
}

/// A device of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedConfig {
    /// The supervisor's name for it.
    pub id: String,
    /// Where it is on the host.
    pub address: HostAddress,
    /// Its container, group and device, opened and tied together; without, they are opened here.
    pub fds: Option<[RawFd; 3]>,
}

/// Where a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// It listens on a socket in the file system.
    Socket(PathBuf),
    /// A connected socket that was handed in.
    Fd(RawFd),
}
