//! The vCPUs: one thread each, all behind one gate.
//!
//! The interrupt controllers are all in KVM (local APICs, I/O APIC, PIC), and there is no PIT. The
//! split form, with the I/O APIC here, would cost an exit for each end of a level interrupt and
//! code that parses what the guest writes; it buys nothing while every device uses MSI-X. VFIO's
//! INTx can be resampled in KVM when the I/O APIC is there too. A PIT would only be calibrated
//! against, and the guest has the TSC's frequency from kvmclock.

use std::{
    io,
    sync::Arc,
    thread::{Builder, JoinHandle},
};

use kvm_ioctls::{Cap, VmFd};

pub mod cpuid;
pub mod exit;
pub mod gate;
pub mod registers;
pub mod thread;

use self::{
    exit::ExitCounts,
    gate::Order,
    thread::{Shared, Surroundings, Vcpu},
};
use crate::{boot::Entry, kvm::Host, sys};

/// The most vCPUs: the area of the ACPI tables has no room to describe more that can come and go.
pub(crate) const MAX_VCPUS: u32 = 512;

/// Why there are no vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// More than KVM can give one VM.
    #[error("{count} vCPUs are more than the {max} that KVM on this host gives one VM")]
    TooMany {
        /// As asked.
        count: u32,
        /// The most.
        max: u32,
    },
    /// KVM refused.
    #[error("KVM can't {action} vCPU {index}")]
    Kvm {
        /// What it refused.
        action: &'static str,
        /// Of which vCPU.
        index: u32,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// A register set could not be read or set.
    #[error("a vCPU's state")]
    Registers(#[from] registers::RegisterError),
    /// No room for the page by which a vCPU is interrupted.
    #[error("can't map the run page of vCPU {index}")]
    Share {
        /// Of which vCPU.
        index: u32,
        /// Why.
        source: io::Error,
    },
    /// No thread.
    #[error("can't {action} a thread for vCPU {index}")]
    Thread {
        /// What failed.
        action: &'static str,
        /// For which vCPU.
        index: u32,
        /// Why.
        source: io::Error,
    },
}

/// All vCPU threads of a VM, held at the gate, parked there or running.
pub struct Vcpus {
    around: Surroundings,
    threads: Vec<(Arc<Shared>, JoinHandle<()>)>,
}

/// Makes `count` vCPUs, those included that may come later: KVM takes none back, and the jail lets
/// no thread be started.
///
/// # Errors
///
/// Fails if they are more than KVM gives, or KVM refuses one.
pub fn create(host: &Host, vm: &VmFd, count: u32) -> Result<Vec<Vcpu>, VcpuError> {
    let host_max = u32::try_from(vm.check_extension_int(Cap::MaxVcpus)).unwrap_or(0);
    let max = host_max.min(MAX_VCPUS);
    if count > max {
        return Err(VcpuError::TooMany { count, max });
    }
    (0..count).map(|index| Vcpu::new(host, vm, index, count)).collect()
}

impl Vcpus {
    /// Starts a thread for each; they wait at the gate, jailed.
    ///
    /// # Errors
    ///
    /// Fails if the host can't start one; those already started end.
    pub fn spawn(vcpus: Vec<Vcpu>, around: Surroundings) -> Result<Self, VcpuError> {
        sys::handle_kick_signal().map_err(|source| VcpuError::Thread {
            action: "let a signal stop",
            index: 0,
            source,
        })?;
        let mut all = Self { around, threads: Vec::with_capacity(vcpus.len()) };
        for (index, vcpu) in (0..).zip(vcpus) {
            let shared = vcpu.share()?;
            let (thread_shared, around) = (Arc::clone(&shared), all.around.clone());
            let thread = Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || vcpu.serve(&thread_shared, &around))
                .map_err(|source| VcpuError::Thread { action: "start", index, source })?;
            all.threads.push((shared, thread));
        }
        all.around.gate.wait_for(all.threads.len());
        Ok(all)
    }

    /// Lets the guest run.
    pub fn run(&self) {
        self.around.gate.order(Order::Run);
    }

    /// Stops the guest and waits until every vCPU is out of it.
    pub fn hold(&self) {
        self.around.gate.hold();
        self.kick();
        self.around.gate.wait_for(self.threads.len());
    }

    /// Puts all vCPUs, which hold, into their start state.
    pub fn reset(&self, entry: Entry) {
        self.around.gate.order(Order::Reset(entry));
        self.around.gate.wait_for(self.threads.len());
    }

    /// Lets vCPU `index`, which was parked, run as the others do.
    pub fn admit(&self, index: u32) {
        self.around.gate.admit(index);
    }

    /// Gets vCPU `index` out of the guest, into its start state, and keeps it there until it is
    /// admitted again.
    pub fn park(&self, index: u32) {
        self.around.gate.dismiss(index);
        let shared = usize::try_from(index).ok().and_then(|index| self.threads.get(index));
        if let Some((shared, _thread)) = shared
            && let Err(error) = shared.kick()
        {
            log::error!("can't interrupt a vCPU: {error}");
        }
        self.around.gate.wait_dismissed(index);
    }

    /// Has the first `count` vCPUs run from now on and no others, while all hold.
    pub fn admit_first(&self, count: u32) {
        self.around.gate.admit_first(count);
    }

    /// How often each vCPU left the guest.
    pub fn exit_counts(&self) -> impl Iterator<Item = &ExitCounts> {
        self.threads.iter().map(|(shared, _thread)| &shared.counts)
    }

    fn kick(&self) {
        for (shared, _thread) in &self.threads {
            if let Err(error) = shared.kick() {
                log::error!("can't interrupt a vCPU: {error}");
            }
        }
    }
}

impl Drop for Vcpus {
    /// Ends all threads.
    fn drop(&mut self) {
        self.around.gate.order(Order::Finish);
        self.kick();
        for (_shared, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
    }
}
