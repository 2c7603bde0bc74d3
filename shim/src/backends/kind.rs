//! What differs between the kinds of devices, as seen by whoever starts their processes.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use crate::{network::Nic, paths::SandboxFiles, plan::DevicePlan};

/// The length of a share's tag in its configuration space.
const FS_TAG_BYTES: usize = 36;
const MIB: u64 = 1 << 20;

impl DevicePlan {
    /// Whether a stand-in can fail its requests in its place, so that the guest gets errors instead
    /// of waiting for ever.
    #[must_use]
    pub fn has_stand_in(&self) -> bool {
        matches!(self, Self::Disk { .. })
    }

    /// The size of the memory in which a process leaves what its successor must know. Pages that it
    /// never touches cost nothing.
    #[must_use]
    pub fn state_bytes(&self) -> u64 {
        match self {
            Self::Share { .. } => 256 * MIB,
            // A thousand connections, each with its buffer.
            Self::Vsock { .. } => 512 * MIB,
            Self::Disk { .. } | Self::Network { .. } => MIB,
        }
    }

    /// How long a process may take until it is ready, when its predecessor crashed: `nacre-blk` waits
    /// until what that one had handed to the kernel has ended, no other one waits for anything.
    #[must_use]
    pub fn successor_within(&self) -> Duration {
        match self {
            Self::Disk { .. } => Duration::from_secs(150),
            Self::Vsock { .. } | Self::Share { .. } | Self::Network { .. } => {
                Duration::from_secs(20)
            }
        }
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &'static str {
        match self {
            Self::Vsock { .. } => "nacre-vsock",
            Self::Share { .. } => "nacre-fs",
            Self::Disk { .. } => "nacre-blk",
            Self::Network { .. } => "nacre-net",
        }
    }

    /// The VMM's word for it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Vsock { .. } => "vsock",
            Self::Share { .. } => "fs",
            Self::Disk { .. } => "blk",
            Self::Network { .. } => "net",
        }
    }

    /// The virtio device type (virtio 1.3, chapter 5).
    #[must_use]
    pub fn device_type(&self) -> u16 {
        match self {
            Self::Network { .. } => 1,
            Self::Disk { .. } => 2,
            Self::Vsock { .. } => 19,
            Self::Share { .. } => 26,
        }
    }
}

/// What is known here of a device's configuration space (virtio 1.3, sections 5.1.4 and 5.11.4).
pub(super) fn config_space(device: &DevicePlan, nic: Option<&Nic>) -> Vec<u8> {
    match (device, nic) {
        (DevicePlan::Share { tag, .. }, _) => {
            let mut bytes = tag.as_bytes().to_vec();
            bytes.resize(FS_TAG_BYTES, 0);
            bytes.extend(1_u32.to_le_bytes());
            bytes
        }
        (DevicePlan::Network { .. }, Some(nic)) => {
            let (link_up, pairs, mtu) = (1_u16, 1_u16, 0_u16);
            let mut bytes = nic.mac.to_vec();
            bytes.extend([link_up, pairs, mtu].map(u16::to_le_bytes).as_flattened());
            bytes
        }
        _ => Vec::new(),
    }
}

/// What a process is to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The first one. Nobody that is on its way out can have its disk, so it does not wait for one
    /// that is in use.
    First,
    /// One that takes up what a predecessor left.
    Successor,
    /// One that fails all requests, because what the device stands for is gone.
    StandIn,
}

impl Role {
    /// What a process of that role is told beside the device's own arguments.
    pub(super) fn arguments(self, device: &DevicePlan) -> &'static [&'static str] {
        match (device, self) {
            (DevicePlan::Disk { .. }, Self::First) => &["--lock-wait", "0"],
            (DevicePlan::Disk { .. }, Self::StandIn) => &["--stand-in"],
            _ => &[],
        }
    }
}

/// The device's own arguments, but for descriptors.
pub(super) fn arguments(device: &DevicePlan, files: &SandboxFiles) -> Vec<OsString> {
    let path = |path: &PathBuf| path.clone().into_os_string();
    let (mut arguments, read_only): (Vec<OsString>, bool) = match device {
        DevicePlan::Vsock { cid } => {
            let socket = files.vsock().into_os_string();
            (vec!["--guest-cid".into(), cid.to_string().into(), "--uds-path".into(), socket], false)
        }
        DevicePlan::Share { tag, path: folder, read_only, submounts, .. } => {
            let mut arguments =
                vec!["--shared-dir".into(), path(folder), "--tag".into(), tag.into()];
            if *submounts {
                arguments.extend(["--announce-submounts", "--xattr"].map(OsString::from));
            }
            (arguments, *read_only)
        }
        DevicePlan::Disk { serial, path: file, read_only } => {
            let arguments = vec!["--disk".into(), path(file), "--serial".into(), serial.into()];
            (arguments, *read_only)
        }
        DevicePlan::Network { .. } => (Vec::new(), false),
    };
    if read_only {
        arguments.push("--read-only".into());
    }
    arguments
}
