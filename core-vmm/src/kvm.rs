//! KVM itself: whether it is there and has what is needed, the VM in it, and that VM's interrupt
//! controllers, which come back to their first state on a reset.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
    kvm_irqchip,
};
use kvm_ioctls::{Cap, Error, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    memory::layout,
    vcpu::cpuid::{MAX_SMALL_IDS, Supported},
};

/// What is needed of KVM beyond the basics.
const CAPABILITIES: [Cap; 6] = [
    Cap::Irqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::IrqRouting,
    Cap::UserMemory,
    Cap::ImmediateExit,
];

/// Why KVM is of no use.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No KVM, or not for this user.
    #[error("can't open /dev/kvm")]
    Absent(#[source] Error),
    /// KVM lacks something.
    #[error("KVM on this host lacks {0:?}")]
    NoCapability(Cap),
    /// KVM refused.
    #[error("KVM can't {action}")]
    Refused {
        /// What it refused.
        action: &'static str,
        /// Why.
        source: Error,
    },
}

fn refused(action: &'static str) -> impl FnOnce(Error) -> KvmError {
    move |source| KvmError::Refused { action, source }
}

/// KVM on this host.
pub struct Host {
    /// The device.
    pub kvm: Kvm,
    /// What it can show a guest.
    pub supported: Supported,
}

/// The VM in KVM and its interrupt controllers.
pub struct Machine {
    /// The VM.
    pub vm: Arc<VmFd>,
    irqchips: Vec<kvm_irqchip>,
}

impl Host {
    /// Opens KVM and sees what it has.
    ///
    /// # Errors
    ///
    /// Fails if it is not there, not permitted, or lacks something.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::Absent)?;
        if let Some(missing) = CAPABILITIES.into_iter().find(|cap| !kvm.check_extension(*cap)) {
            return Err(KvmError::NoCapability(missing));
        }
        let supported = Supported::of(&kvm).map_err(refused("tell what CPUID it supports"))?;
        Ok(Self { kvm, supported })
    }

    /// Makes a VM with interrupt controllers, for up to so many vCPUs.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses.
    pub fn create_machine(&self, max_cpus: u32) -> Result<Machine, KvmError> {
        let vm = loop {
            match self.kvm.create_vm() {
                // The kernel allocates much and lets a signal interrupt it.
                Err(error) if error.errno() == libc::EINTR => {}
                other => break other.map_err(refused("create a VM"))?,
            }
        };
        if max_cpus > MAX_SMALL_IDS {
            let [whole_ids, no_broadcast] =
                [KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK];
            let mut cap = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
            cap.args[0] = u64::from(whole_ids | no_broadcast);
            vm.enable_cap(&cap).map_err(refused("give interrupts whole destinations"))?;
        }
        vm.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(refused("place its identity map"))?;
        vm.set_tss_address(layout::TSS).map_err(refused("place its task state segment"))?;
        vm.create_irq_chip().map_err(refused("make interrupt controllers"))?;
        let irqchips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                vm.get_irqchip(&mut chip).map_err(refused("read an interrupt controller"))?;
                Ok(chip)
            })
            .collect::<Result<_, _>>()?;
        Ok(Machine { vm: Arc::new(vm), irqchips })
    }
}

impl Machine {
    /// Raises the I/O APIC's pin `gsi` whenever `interrupt` is written.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses.
    pub fn connect_pin(&self, interrupt: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.vm.register_irqfd(interrupt, gsi).map_err(refused("connect an interrupt"))
    }

    /// Puts the interrupt controllers into their first state, with every vCPU stopped.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses what it gave itself.
    pub fn reset_interrupt_controllers(&self) -> Result<(), KvmError> {
        self.irqchips.iter().try_for_each(|chip| {
            self.vm.set_irqchip(chip).map_err(refused("reset an interrupt controller"))
        })
    }
}
