//! A vCPU and the thread that runs it.

use std::sync::{
    Arc,
    atomic::{AtomicI32, Ordering},
};

use kvm_ioctls::{VcpuFd, VmFd};
use seccompiler::BpfProgram;

use super::{
    VcpuError, cpuid,
    exit::{self, After, Buses, ExitCounts, Registers},
    gate::{Gate, Order},
    registers::{self, ResetState},
};
use crate::{
    boot::Entry,
    event::{GuestEvent, Notifier},
    kvm::Host,
    sys::{self, ImmediateExit},
};

/// A vCPU that no thread runs yet.
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    reset_state: ResetState,
    /// Still as KVM made it.
    is_fresh: bool,
}

/// What a vCPU thread shares with the control thread.
#[derive(Debug)]
pub struct Shared {
    /// The thread, as the kernel names it; 0 until it has begun.
    thread_id: AtomicI32,
    immediate_exit: ImmediateExit,
    /// How often it left the guest.
    pub counts: ExitCounts,
}

/// What every vCPU thread needs.
#[derive(Clone)]
pub struct Surroundings {
    /// What the guest reaches by exits.
    pub buses: Buses,
    /// To the control thread.
    pub notifier: Arc<Notifier>,
    /// From the control thread.
    pub gate: Arc<Gate>,
    /// The thread's system calls; none is a test's.
    pub filter: Arc<BpfProgram>,
}

impl Shared {
    /// Gets the thread out of the guest, or keeps it from going there once.
    ///
    /// # Errors
    ///
    /// Fails if the signal can't be sent.
    pub fn kick(&self) -> std::io::Result<()> {
        self.immediate_exit.set(true);
        match self.thread_id.load(Ordering::SeqCst) {
            0 => Ok(()),
            thread_id => sys::kick_thread(thread_id),
        }
    }
}

impl Vcpu {
    /// Makes vCPU `index` of `count`.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses any part.
    pub fn new(host: &Host, vm: &VmFd, index: u32, count: u32) -> Result<Self, VcpuError> {
        let failed = |action| move |source| VcpuError::Kvm { action, index, source };
        let has_large_ids = count > cpuid::MAX_SMALL_IDS;
        let fd = vm.create_vcpu(index.into()).map_err(failed("make"))?;
        let cpuid =
            cpuid::to_kvm(&host.supported.for_vcpu(index, count)).map_err(failed("describe"))?;
        fd.set_cpuid2(&cpuid).map_err(failed("set the CPUID of"))?;
        if has_large_ids {
            registers::enable_x2apic(&fd)?;
        }
        let msrs = host.kvm.get_msr_index_list().map_err(failed("list the MSRs of"))?;
        let reset_state = ResetState::capture(&fd, msrs.as_slice())?;
        Ok(Self { index, fd, reset_state, is_fresh: true })
    }

    /// A descriptor of what KVM counts about it.
    ///
    /// # Errors
    ///
    /// Fails if this KVM has none to give.
    pub fn statistics(&self) -> std::io::Result<std::fs::File> {
        sys::kvm_statistics(&self.fd)
    }

    /// The half that the control thread keeps.
    ///
    /// # Errors
    ///
    /// Fails if the host has no room for one more page.
    pub fn share(&self) -> Result<Arc<Shared>, VcpuError> {
        let immediate_exit = ImmediateExit::of(&self.fd)
            .map_err(|source| VcpuError::Share { index: self.index, source })?;
        Ok(Arc::new(Shared {
            thread_id: AtomicI32::new(0),
            immediate_exit,
            counts: ExitCounts::default(),
        }))
    }

    /// The thread's life: obey orders until the last.
    pub fn serve(mut self, shared: &Shared, around: &Surroundings) {
        let mut visitor = around.gate.visit(self.index);
        shared.thread_id.store(sys::thread_id(), Ordering::SeqCst);
        if let Err(error) = seccompiler::apply_filter(&around.filter) {
            around.notifier.raise(self.failed(&error));
            return;
        }
        loop {
            match visitor.next_order() {
                Order::Finish => {
                    log::debug!("vCPU {} ends at {}", self.index, Registers(&self.fd));
                    return;
                }
                Order::Hold => {}
                Order::Reset(entry) => {
                    self.take_start_state(Some(&entry), around);
                }
                Order::Park => self.take_start_state(None, around),
                Order::Run => {
                    self.run(shared, around);
                    self.settle(shared, around);
                }
            }
        }
    }

    fn failed(&self, error: &dyn std::error::Error) -> GuestEvent {
        GuestEvent::Failed { vcpu: self.index, reason: crate::error_chain(error) }
    }

    fn take_start_state(&mut self, entry: Option<&Entry>, around: &Surroundings) {
        if let Err(error) = self.reset(entry) {
            around.notifier.raise(self.failed(&error));
        }
    }

    fn reset(&mut self, entry: Option<&Entry>) -> Result<(), registers::RegisterError> {
        if !std::mem::take(&mut self.is_fresh) {
            self.reset_state.restore(&self.fd)?;
        }
        registers::prepare(&self.fd, entry.filter(|_entry| self.index == 0))
    }

    /// Runs the guest while the gate is open.
    fn run(&mut self, shared: &Shared, around: &Surroundings) {
        // What is left of a kick that came while it waited. One that comes after this line has
        // closed the gate before, which is looked at next.
        shared.immediate_exit.set(false);
        while around.gate.is_open(self.index) {
            match exit::run(&mut self.fd, &around.buses, &shared.counts) {
                After::Again | After::Interrupted => {}
                After::Crash(reason) => {
                    log::error!("vCPU {}: {reason}: {}", self.index, Registers(&self.fd));
                    around.notifier.raise(GuestEvent::Crash { vcpu: self.index, reason });
                }
                After::Failed(error) => around.notifier.raise(self.failed(&error)),
            }
        }
    }

    /// Lets KVM finish the instruction of the last exit, so that what is set from now on is not
    /// overwritten by it.
    fn settle(&mut self, shared: &Shared, around: &Surroundings) {
        shared.immediate_exit.set(true);
        // An instruction that accesses memory in several pieces exits for each.
        while let After::Again = exit::run(&mut self.fd, &around.buses, &shared.counts) {}
    }
}
