//! The VMM of one sandbox: guest memory, vCPUs, PCI, ACPI and one generic vhost-user frontend.
//!
//! It does nothing on the data path: a kick goes from the guest through a KVM ioeventfd to a
//! backend, an interrupt from the backend through an irqfd to the guest.

use std::{
    error::Error,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nacre_proto::exit::VmmExit;

pub mod acpi;
pub mod args;
pub mod boot;
pub mod bug;
pub mod bus;
pub mod command;
pub mod config;
pub mod console;
pub mod control;
pub mod devices;
pub mod event;
pub mod hotplug;
pub mod interrupt;
pub mod jail;
pub mod kvm;
pub mod legacy;
pub mod logger;
pub mod memory;
pub mod passthrough;
pub mod pci;
pub mod poll;
pub mod seccomp;
pub mod shared_event;
pub mod statistics;
pub mod supervisor;
mod sys;
pub mod timing;
pub mod vcpu;
pub mod virtio;
pub mod vm;

use self::{
    config::Config,
    control::{Control, ControlError},
    jail::JailError,
    seccomp::SeccompError,
    supervisor::Supervisor,
    vcpu::VcpuError,
    vm::VmError,
};

/// Why a VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It could not be made.
    #[error("can't make the VM")]
    Vm(#[from] VmError),
    /// The jail.
    #[error("can't enter the jail")]
    Jail(#[from] JailError),
    /// The filter.
    #[error("can't filter the control thread's system calls")]
    Seccomp(#[from] SeccompError),
    /// The kernel refuses the filter.
    #[error("the kernel refuses a filter of system calls")]
    Filter(#[from] seccompiler::Error),
    /// The supervisor's socket or the signals.
    #[error("can't {action}")]
    Host {
        /// What failed.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It failed while it ran.
    #[error("the VM failed")]
    Control(#[from] ControlError),
}

impl VmmError {
    /// The exit code that tells a supervisor what kind of failure it was.
    #[must_use]
    pub fn exit(&self) -> VmmExit {
        match self {
            Self::Vm(VmError::Boot(error)) if error.is_about_file() => VmmExit::BootFile,
            Self::Vm(VmError::Memory(_) | VmError::Plan(_)) => VmmExit::Memory,
            Self::Vm(VmError::Devices(_)) => VmmExit::Backend,
            Self::Vm(VmError::Vcpu(VcpuError::TooMany { .. })) => VmmExit::Cpus,
            Self::Vm(VmError::Kvm(_) | VmError::Vcpu(VcpuError::Kvm { .. })) => VmmExit::Kvm,
            _ => VmmExit::Failed,
        }
    }
}

/// The lock, whatever became of its last holder: state stays usable, and where a thread panicked the
/// VM is about to end.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error and all its causes on one line.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}

/// Makes the VM and runs it to its end.
///
/// # Errors
///
/// Fails if the VM can't be made, or the host fails it.
pub fn run(config: &Config) -> Result<VmmExit, VmmError> {
    let started_ns = timing::now_ns();
    // Before any thread is there.
    sys::one_arena();
    let host = |action| move |source| VmmError::Host { action, source };
    let supervisor = config
        .control_fd
        .map(sys::inherited_fd)
        .transpose()
        .map_err(host("take over the control socket"))?;
    let signals = sys::termination_signals().map_err(host("watch for signals"))?;
    jail::allow_descriptors().map_err(host("have all descriptors that it may"))?;
    let built = vm::build(config)?;
    let filter = seccomp::control_filter()?;
    jail::enter()?;
    let vm = built.spawn()?;
    let control =
        Control::new(vm, signals, supervisor.map(Supervisor::new), config.on_reset, started_ns)?;
    seccompiler::apply_filter(&filter)?;
    Ok(control.run()?)
}
