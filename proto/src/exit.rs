//! Exit codes: how one process of a sandbox tells its supervisor why it ended.

/// How `nacre-vmm` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum VmmExit {
    /// The guest powered itself off.
    PowerOff = 0,
    /// A host-side failure while the VM ran.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A file that the VM needs (kernel, initramfs) is missing, unreadable or malformed.
    BootFile = 3,
    /// Guest memory could not be had, or its size makes no sense.
    Memory = 4,
    /// KVM is absent, not permitted, or refuses what was asked.
    Kvm = 5,
    /// A vhost-user backend could not be reached or does not fit during start.
    Backend = 6,
    /// The guest asked for a reset and `--on-reset exit` was given.
    Reset = 7,
    /// The guest's kernel reported a panic.
    GuestPanic = 8,
    /// A vCPU stopped for a reason the guest can't recover from (triple fault, KVM error).
    GuestCrash = 9,
    /// The supervisor asked for an immediate stop.
    Stopped = 10,
    /// More vCPUs than KVM gives one VM.
    Cpus = 11,
}

/// How a device backend ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BackendExit {
    /// Asked to stop (SIGTERM), or its one connection on `--fd` is over.
    Done = 0,
    /// The host failed it while serving.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// Its resource (disk, tap, folder, socket) can't be opened.
    Resource = 3,
    /// The jail could not be set up.
    Jail = 4,
    /// A worker thread ended; the queues it served are stuck, so the process ends too.
    WorkerDied = 5,
    /// A predecessor's state (`--state-fd`, `--store-fd`) is of a version that this program can't
    /// read, or malformed. Nothing in it was changed: the predecessor's program can take it up.
    State = 6,
}

/// Exit codes of `nacre run` that are not the container's own.
///
/// A container's code is passed through; one that is ended by signal n gives 128 + n. Codes from
/// [`RunExit::Usage`] to [`RunExit::BackendStart`], and [`RunExit::Device`], say which part of the set-up
/// failed, before any guest ran:
/// [`RunExit::Setup`] is for the rest. As with every container tool, a container may exit with one
/// of these codes itself; the line on standard error tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RunExit {
    /// A device of the host's can't be given to the guest.
    Device = 103,
    /// The container ended with 0, but the guest did not write back all that it wrote.
    NotWritten = 104,
    /// The command line makes no sense.
    Usage = 105,
    /// Not root, or root without a capability that is needed.
    NotPermitted = 106,
    /// The name is in use, or no sandbox has it, or not one that can do what was asked.
    Name = 107,
    /// The kernel or the initramfs is missing, unreadable, empty or malformed.
    BootFile = 108,
    /// The root file system, a folder or an image, is missing, unreadable or malformed.
    RootFs = 109,
    /// The folder of a volume is missing or unreadable.
    Volume = 110,
    /// A disk is missing, unreadable or no disk.
    Disk = 111,
    /// Memory of 0, or more than the host has or a guest can address, or no room for it.
    Memory = 112,
    /// No CPUs, or more than KVM gives one VM.
    Cpus = 113,
    /// KVM is absent, not permitted, or refuses what was asked.
    Kvm = 114,
    /// The host gives no network.
    Network = 115,
    /// The host does not take a limit.
    Limits = 116,
    /// A program of Nacre's, the VMM or a backend, is missing or can't be started.
    Program = 117,
    /// A backend ended, or did not become ready, before the VMM was started.
    BackendStart = 118,
    /// The guest powered off or reset itself, without a panic and unasked.
    GuestLeft = 119,
    /// The guest's kernel panicked or crashed.
    GuestPanic = 120,
    /// The container was ended by the out-of-memory killer.
    OutOfMemory = 121,
    /// The VMM died or failed.
    VmmDied = 122,
    /// A device backend died, and its device is lost for good.
    BackendDied = 123,
    /// The agent did not answer.
    AgentSilent = 124,
    /// Nacre failed before the container ran, in a way that has no code of its own.
    Setup = 125,
    /// The container's program can't be executed.
    CannotExecute = 126,
    /// The container's program was not found.
    NotFound = 127,
}

/// Exit codes of `nacre device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeviceExit {
    /// As asked.
    Done = 0,
    /// The new program does not serve; the old one does again.
    FellBack = 1,
    /// The device is not served; its supervisor goes on trying.
    NotBack = 2,
    /// The guest does not give the device up.
    Kept = 3,
    /// The guest was asked to give the device up, and has not answered yet.
    Leaving = 4,
    /// Nothing was done.
    Refused = 125,
}

/// Exit codes of `nacre resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ResizeExit {
    /// As asked.
    Done = 0,
    /// The guest has, or uses, less than was asked for, or kept more.
    Partly = 1,
    /// Nothing was done.
    Refused = 125,
}

impl From<ResizeExit> for u8 {
    fn from(exit: ResizeExit) -> Self {
        exit as Self
    }
}

impl From<VmmExit> for u8 {
    fn from(exit: VmmExit) -> Self {
        exit as Self
    }
}

impl From<BackendExit> for u8 {
    fn from(exit: BackendExit) -> Self {
        exit as Self
    }
}

impl From<RunExit> for u8 {
    fn from(exit: RunExit) -> Self {
        exit as Self
    }
}

impl From<DeviceExit> for u8 {
    fn from(exit: DeviceExit) -> Self {
        exit as Self
    }
}

impl VmmExit {
    /// The way of ending that `code` stands for.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|exit| u8::from(*exit) == code)
    }

    /// All of them, for tables and tests.
    pub const ALL: [Self; 12] = [
        Self::PowerOff,
        Self::Failed,
        Self::Usage,
        Self::BootFile,
        Self::Memory,
        Self::Kvm,
        Self::Backend,
        Self::Reset,
        Self::GuestPanic,
        Self::GuestCrash,
        Self::Stopped,
        Self::Cpus,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vmm_exit_is_found_by_its_code() {
        for exit in VmmExit::ALL {
            assert_eq!(VmmExit::from_code(exit.into()), Some(exit));
        }
        assert_eq!(VmmExit::from_code(12), None);
    }
}
