//! A VM from its description to its vCPU threads, as a chain in which each step takes the one
//! before:
//!
//! ```text
//! Config ──build()──▶ Built ──spawn()──▶ Vm ──run()/hold()/reset()──▶ … ──drop──▶ gone
//!         everything        one thread       the control thread
//!         is opened         a vCPU, held     owns it
//! ```
//!
//! Nothing is opened after `build`, so the jail is entered between the two.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    acpi::{
        ged::EventDevice,
        tables::{self, AcpiError, Machine},
    },
    boot::{BootError, BootSource},
    bus::{BusBuilder, BusError},
    config::{Config, SerialConfig},
    devices::{self, Devices, DevicesError},
    event::{self, Mailbox, Notifier},
    jail,
    legacy::{
        panic::{self, PanicPort},
        power::{self, KeyboardReset, PowerRegisters},
        rtc::{self, Clock},
        serial::{self, SerialPort},
    },
    memory::{
        layout,
        region::{self, GuestRam, MemoryError},
    },
    seccomp::{self, SeccompError},
    sys,
    vcpu::{
        self, VcpuError, Vcpus,
        cpuid::Supported,
        exit::Buses,
        gate::Gate,
        thread::{Surroundings, Vcpu},
    },
};

/// Why there is no VM, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No KVM.
    #[error("can't open /dev/kvm")]
    NoKvm(#[source] kvm_ioctls::Error),
    /// KVM lacks something.
    #[error("KVM on this host lacks {0:?}")]
    NoCapability(Cap),
    /// KVM refused.
    #[error("KVM can't {action}")]
    Kvm {
        /// What it refused.
        action: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// vCPUs.
    #[error("no vCPUs")]
    Vcpu(#[from] VcpuError),
    /// Guest memory.
    #[error("no guest memory")]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs, command line.
    #[error("can't boot")]
    Boot(#[from] BootError),
    /// ACPI tables.
    #[error("no ACPI tables")]
    Acpi(#[from] AcpiError),
    /// Two devices in one place.
    #[error("can't lay out the bus")]
    Bus(#[from] BusError),
    /// A device or its backend.
    #[error("a device is missing")]
    Devices(#[from] DevicesError),
    /// No descriptors or the like.
    #[error("can't make {what}")]
    Host {
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The filter.
    #[error("can't filter system calls")]
    Seccomp(#[from] SeccompError),
}

/// The serial port and where its input comes from.
pub struct Console {
    /// The device.
    pub port: Arc<SerialPort>,
    /// Input, if there is any.
    pub input: Option<File>,
}

/// What stays the same from build to end.
pub struct Parts {
    vm: Arc<VmFd>,
    ram: GuestRam,
    boot: BootSource,
    machine: Machine,
    irqchips: Vec<kvm_irqchip>,
    devices: Devices,
    /// The event device.
    pub events: Arc<EventDevice>,
    /// The serial port, if there is one.
    pub console: Option<Console>,
    /// What vCPUs tell.
    pub mailbox: Mailbox,
}

/// A VM whose threads are not started.
pub struct Built {
    parts: Parts,
    vcpus: Vec<Vcpu>,
    around: Surroundings,
}

/// A VM whose vCPUs run or are held.
pub struct Vm {
    /// Ended first.
    vcpus: Vcpus,
    /// All the rest.
    pub parts: Parts,
    resets: u64,
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}

fn kvm_failed(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { action, source }
}

/// What is needed of KVM beyond the basics.
const CAPABILITIES: [Cap; 6] = [
    Cap::Irqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::IrqRouting,
    Cap::UserMemory,
    Cap::ImmediateExit,
];

/// Opens and makes everything that the VM needs.
///
/// # Errors
///
/// Fails if the host, KVM or a file does not allow it.
pub fn build(config: &Config) -> Result<Built, VmError> {
    let boot = BootSource::open(&config.kernel, config.initramfs.as_deref(), &config.command_line)?;
    let kvm = Kvm::new().map_err(VmError::NoKvm)?;
    if let Some(missing) = CAPABILITIES.into_iter().find(|cap| !kvm.check_extension(*cap)) {
        return Err(VmError::NoCapability(missing));
    }
    let supported = Supported::of(&kvm).map_err(kvm_failed("tell what CPUID it supports"))?;
    let address_bits = supported.address_bits();
    region::check_size(config.memory_bytes, address_bits)?;
    let vm = Arc::new(create_vm(&kvm)?);
    let ram = GuestRam::new(config.memory_bytes)?;
    ram.register(&vm)?;
    let irqchips = interrupt_chips(&vm)?;
    let vcpus = vcpu::create(&kvm, &vm, &supported, config.cpus)?;
    let backends = devices::connect(&config.devices, jail::watchdog()?)?;
    let devices = Devices::attach(backends, &vm, address_bits)?;
    let gate = Arc::new(Gate::new());
    let (notifier, mailbox) = event::channel(Arc::clone(&gate)).map_err(host("an eventfd"))?;
    let events = Arc::new(EventDevice::new().map_err(host("the event device"))?);
    let console = console(&config.serial)?;
    let parts = Parts {
        machine: Machine { cpus: config.cpus, address_bits, has_serial: console.is_some() },
        vm,
        ram,
        boot,
        irqchips,
        devices,
        events,
        console,
        mailbox,
    };
    parts.connect_interrupts()?;
    let around = Surroundings {
        buses: parts.buses(&notifier)?,
        notifier,
        gate,
        filter: Arc::new(seccomp::vcpu_filter()?),
    };
    Ok(Built { parts, vcpus, around })
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    let vm = loop {
        match kvm.create_vm() {
            // The kernel allocates much and lets a signal interrupt it.
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(kvm_failed("create a VM"))?,
        }
    };
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(kvm_failed("place its identity map"))?;
    vm.set_tss_address(layout::TSS).map_err(kvm_failed("place its task state segment"))?;
    vm.create_irq_chip().map_err(kvm_failed("make interrupt controllers"))?;
    Ok(vm)
}

/// The interrupt controllers' first state, to come back to.
fn interrupt_chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, VmError> {
    [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(kvm_failed("read an interrupt controller"))?;
            Ok(chip)
        })
        .collect()
}

fn console(config: &SerialConfig) -> Result<Option<Console>, VmError> {
    let duplicate = |fd: BorrowedFd<'_>| {
        fd.try_clone_to_owned().map(File::from).map_err(host("the serial port's descriptor"))
    };
    let (output, input) = match config {
        SerialConfig::None => return Ok(None),
        SerialConfig::Stdio => {
            (duplicate(io::stdout().as_fd())?, Some(duplicate(io::stdin().as_fd())?))
        }
        SerialConfig::Fd(fd) => {
            let both = File::from(sys::inherited_fd(*fd).map_err(host("the serial port"))?);
            (both.try_clone().map_err(host("the serial port"))?, Some(both))
        }
        SerialConfig::File(path) => {
            (File::create(path).map_err(host("the serial port's file"))?, None)
        }
    };
    let port = Arc::new(SerialPort::new(output).map_err(host("the serial port"))?);
    Ok(Some(Console { port, input }))
}

impl Parts {
    fn connect_interrupts(&self) -> Result<(), VmError> {
        let connect = |interrupt: &EventFd, gsi| {
            self.vm.register_irqfd(interrupt, gsi).map_err(kvm_failed("connect an interrupt"))
        };
        connect(self.events.interrupt(), layout::EVENT_GSI)?;
        if let Some(console) = &self.console {
            connect(console.port.interrupt(), layout::SERIAL_GSI)?;
        }
        Ok(())
    }

    fn buses(&self, notifier: &Arc<Notifier>) -> Result<Buses, VmError> {
        let mut pio = BusBuilder::new();
        let power = PowerRegisters::new(Arc::clone(notifier));
        pio.insert(power::PORT, power::PORTS, Arc::new(power))?;
        let keyboard = KeyboardReset::new(Arc::clone(notifier));
        pio.insert(power::KEYBOARD_PORT, 1, Arc::new(keyboard))?;
        let panic_port = PanicPort::new(Arc::clone(notifier));
        pio.insert(panic::PORT.into(), 1, Arc::new(panic_port))?;
        pio.insert(rtc::PORT.into(), rtc::PORTS, Arc::new(Clock::default()))?;
        if let Some(console) = &self.console {
            let port = Arc::clone(&console.port);
            pio.insert(serial::PORT.into(), serial::PORTS, port)?;
        }
        let mut mmio = BusBuilder::new();
        let registers = layout::EVENT_REGISTERS;
        let events = Arc::clone(&self.events);
        mmio.insert(registers.start, registers.end - registers.start, events)?;
        self.devices.register(&mut pio, &mut mmio)?;
        Ok(Buses { pio: pio.into_pio(), mmio: mmio.into_mmio() })
    }
}

impl Built {
    /// Loads the guest and starts the vCPU threads, which hold.
    ///
    /// # Errors
    ///
    /// Fails if the kernel can't be loaded or a thread can't be started.
    pub fn spawn(self) -> Result<Vm, VmError> {
        let entry = self.parts.boot.load(&self.parts.ram)?;
        tables::write(&self.parts.machine, &self.parts.ram.memory)?;
        let vcpus = Vcpus::spawn(self.vcpus, self.around)?;
        vcpus.reset(entry);
        Ok(Vm { vcpus, parts: self.parts, resets: 0 })
    }
}

impl Vm {
    /// Lets the guest run.
    pub fn run(&self) {
        self.vcpus.run();
    }

    /// Takes a guest back to its first instruction and holds it there.
    ///
    /// # Errors
    ///
    /// Fails if the host or KVM does; the VM is of no use then.
    pub fn reset(&mut self) -> Result<(), VmError> {
        self.vcpus.hold();
        self.parts.mailbox.clear();
        self.parts.devices.reset();
        self.parts.events.reset();
        for chip in &self.parts.irqchips {
            self.parts.vm.set_irqchip(chip).map_err(kvm_failed("reset an interrupt controller"))?;
        }
        self.parts.ram.wipe()?;
        let entry = self.parts.boot.load(&self.parts.ram)?;
        tables::write(&self.parts.machine, &self.parts.ram.memory)?;
        self.vcpus.reset(entry);
        self.resets += 1;
        Ok(())
    }

    /// What is readable when a device wants [`Vm::process_device`], in order.
    pub fn device_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.parts.devices.ready_fds()
    }

    /// Lets device `index` do what is to do.
    pub fn process_device(&mut self, index: usize) {
        self.parts.devices.process(index, &self.parts.ram.memory);
    }

    /// How often the guest was reset.
    #[must_use]
    pub fn resets(&self) -> u64 {
        self.resets
    }

    /// The vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// How many vCPUs and how many bytes of RAM there are.
    #[must_use]
    pub fn size(&self) -> (u32, u64) {
        let ram = &self.parts.ram.ram;
        (self.parts.machine.cpus, ram.ranges().map(|range| range.end - range.start).sum())
    }
}
