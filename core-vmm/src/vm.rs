//! A VM from its description to its vCPU threads, as a chain in which each step takes the one
//! before:
//!
//! ```text
//! Config --build()--> Built --spawn()--> Vm --run()/begin_reset()/finish_reset()--> ... --drop--> gone
//!         everything        one thread       the control thread
//!         is opened         a vCPU, held     owns it
//! ```
//!
//! Nothing is opened after `build`, so the jail is entered between the two.

use std::{
    io,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    sync::Arc,
};

use nacre_proto::vmm::{self, DeviceStatus};

use crate::{
    acpi::{
        cpu_hotplug::CpuController,
        ged::{self, EventDevice},
        memory_hotplug::MemoryHotplug,
        tables::{self, AcpiError, Machine},
    },
    boot::{BootError, BootSource},
    bus::{BusBuilder, BusError},
    config::Config,
    console::Console,
    devices::{self, DeviceKey, Devices, DevicesError, boot},
    event::{self, Mailbox, Notifier},
    hotplug::{
        self,
        cpus::{Cpus, CpusError},
        memory::{Memory, SetMemoryError},
    },
    jail,
    kvm::{self, KvmError},
    legacy::{
        panic::{self, PanicPort},
        power::{self, KeyboardReset, PowerRegisters},
        rtc::{self, Clock},
        serial,
    },
    memory::{
        hotplug::{Plan, PlanError},
        layout,
        region::{self, GuestRam, MemoryError},
        slots::Slots,
        unit::Site,
    },
    passthrough,
    seccomp::{self, SeccompError},
    statistics::Statistics,
    vcpu::{
        self, VcpuError, Vcpus,
        exit::Buses,
        gate::Gate,
        thread::{Surroundings, Vcpu},
    },
    virtio::{RequestError, Watchdog},
};

/// Why there is no VM, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM.
    #[error("no VM in KVM")]
    Kvm(#[from] KvmError),
    /// vCPUs.
    #[error("no vCPUs")]
    Vcpu(#[from] VcpuError),
    /// Guest memory.
    #[error("no guest memory")]
    Memory(#[from] MemoryError),
    /// Guest memory to come.
    #[error("no place for memory to plug")]
    Plan(#[from] PlanError),
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

/// What stays the same from build to end.
pub struct Parts {
    kvm: kvm::Machine,
    /// The guest's memory.
    pub ram: GuestRam,
    boot: BootSource,
    machine: Machine,
    /// vCPUs that come and go.
    pub cpus: Cpus,
    /// The devices.
    pub devices: Devices,
    /// The event device.
    pub events: Arc<EventDevice>,
    /// RAM that comes and goes.
    pub memory: Memory,
    /// The serial port, if there is one.
    pub console: Option<Console>,
    /// What vCPUs tell.
    pub mailbox: Mailbox,
    /// What KVM counts.
    pub statistics: Statistics,
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
    /// What the supervisor has yet to be told of what comes and goes.
    untold: Vec<vmm::Event>,
}

fn unavailable(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}

/// Opens and makes everything that the VM needs.
///
/// # Errors
///
/// Fails if the host, KVM or a file does not allow it.
pub fn build(config: &Config) -> Result<Built, VmError> {
    let boot = BootSource::open(&config.kernel, config.initramfs.as_deref(), &config.command_line)?;
    let host = kvm::Host::open()?;
    let address_bits = host.supported.address_bits();
    region::check_size("--memory", config.memory_bytes, address_bits)?;
    region::check_size("--max-memory", config.max_memory_bytes, address_bits)?;
    let kvm = host.create_machine(config.max_cpus)?;
    let mut ram = GuestRam::new(config.memory_bytes)?;
    let plan = Plan::new(&ram.ram, config.max_memory_bytes, address_bits)?;
    let slots = Slots::of(&kvm.vm);
    ram.register(&kvm.vm, &slots)?;
    let site = Site::new(plan, Arc::clone(&kvm.vm), slots.clone())?;
    let vcpus = vcpu::create(&host, &kvm.vm, config.max_cpus)?;
    let statistics = Statistics::open(&kvm.vm, &vcpus);
    let gate = Arc::new(Gate::with(config.max_cpus, config.cpus));
    let (notifier, mailbox) =
        event::channel(Arc::clone(&gate)).map_err(unavailable("an eventfd"))?;
    let devices = boot_devices(config, (&kvm, &slots, &ram), address_bits, &notifier)?;
    let events = Arc::new(EventDevice::new().map_err(unavailable("the event device"))?);
    let cpu_controller = CpuController::new(config.cpus, config.max_cpus, Arc::clone(&notifier));
    let memory_controller = Arc::new(MemoryHotplug::new(plan.units(), Arc::clone(&notifier)));
    let console = Console::open(&config.serial).map_err(unavailable("the serial port"))?;
    let parts = Parts {
        machine: Machine {
            cpus: config.cpus,
            max_cpus: config.max_cpus,
            address_bits,
            pci_segments: config.pci_segments,
            has_serial: console.is_some(),
            memory: plan,
        },
        kvm,
        ram,
        boot,
        devices,
        cpus: Cpus::new(Arc::new(cpu_controller)),
        events,
        memory: Memory::new(site, memory_controller),
        console,
        mailbox,
        statistics,
    };
    parts.connect_interrupts()?;
    let around = Surroundings {
        buses: parts.buses(&notifier)?,
        notifier,
        gate,
        filter: Arc::new(seccomp::vcpu_filter(config.may_have_passthrough())?),
    };
    Ok(Built { parts, vcpus, around })
}

fn boot_devices(
    config: &Config,
    (kvm, slots, ram): (&kvm::Machine, &Slots, &GuestRam),
    address_bits: u32,
    notifier: &Arc<Notifier>,
) -> Result<Devices, VmError> {
    if config.may_have_passthrough() {
        passthrough::allow_pinning();
    }
    // There without any device too: one may be added.
    let watchdog = Watchdog::start(jail::watchdog()?).map_err(unavailable("a watchdog"))?;
    let backends = boot::connect_all_of(&config.devices, &watchdog)?;
    let hotplug = devices::pci(config.pci_segments, address_bits, notifier);
    let mut devices = Devices::new(hotplug, (&kvm.vm, slots), watchdog);
    for backend in backends {
        devices.place(devices.virtio(backend)?)?;
    }
    for assigned in &config.assigned {
        let opened = boot::open_assigned(assigned)?;
        devices.place(devices.assigned(&assigned.id, opened, &ram.memory)?)?;
    }
    Ok(devices)
}

impl Parts {
    fn connect_interrupts(&self) -> Result<(), VmError> {
        self.kvm.connect_pin(self.events.interrupt(), layout::EVENT_GSI)?;
        if let Some(console) = &self.console {
            self.kvm.connect_pin(console.port.interrupt(), layout::SERIAL_GSI)?;
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
        let registers = layout::EVENT_DEVICE;
        let events = Arc::clone(&self.events);
        mmio.insert(registers.start, registers.end - registers.start, events)?;
        let registers = layout::MEMORY_HOTPLUG;
        let memory = Arc::clone(self.memory.controller());
        mmio.insert(registers.start, registers.end - registers.start, memory)?;
        let registers = layout::CPU_HOTPLUG;
        let cpus = Arc::clone(self.cpus.controller());
        mmio.insert(registers.start, registers.end - registers.start, cpus)?;
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
        Ok(Vm { vcpus, parts: self.parts, resets: 0, untold: Vec::new() })
    }
}

impl Vm {
    /// Lets the guest run.
    pub fn run(&self) {
        self.vcpus.run();
    }

    /// Begins to take the guest back to its first instruction: holds it, and its devices are as
    /// after power-on.
    ///
    /// # Errors
    ///
    /// Fails if a device of the host's can't be kept from the guest's memory.
    pub fn begin_reset(&mut self) -> Result<(), VmError> {
        self.vcpus.hold();
        self.parts.mailbox.clear();
        // What the guest ejected before.
        self.process_cpus();
        self.untold.extend(self.parts.cpus.reset(&self.vcpus));
        self.parts.machine.cpus = self.parts.cpus.present();
        self.parts.devices.reset()?;
        self.parts.events.reset();
        let parts = &mut self.parts;
        self.untold.extend(parts.memory.reset(&mut parts.ram, &mut parts.devices));
        Ok(())
    }

    /// Whether nobody writes to the guest's memory that could not be stopped: a reset may end.
    #[must_use]
    pub fn is_still(&self) -> bool {
        self.parts.devices.are_still()
    }

    /// Ends what [`Vm::begin_reset`] began; the guest is held at its first instruction, and what it
    /// was asked to give up is gone.
    ///
    /// # Errors
    ///
    /// Fails if the host or KVM does; the VM is of no use then.
    pub fn finish_reset(&mut self) -> Result<(), VmError> {
        self.untold.extend(hotplug::devices::finish(&mut self.parts.devices));
        self.parts.kvm.reset_interrupt_controllers()?;
        self.parts.ram.wipe()?;
        self.parts.memory.wipe()?;
        // What was wiped has new pages.
        self.parts.devices.resume(&self.parts.ram.memory)?;
        let entry = self.parts.boot.load(&self.parts.ram)?;
        tables::write(&self.parts.machine, &self.parts.ram.memory)?;
        self.vcpus.reset(entry);
        self.resets += 1;
        Ok(())
    }

    /// What is readable when a device wants [`Vm::process_device`].
    pub fn device_fds(&self) -> impl Iterator<Item = (DeviceKey, BorrowedFd<'_>)> {
        self.parts.devices.ready_fds()
    }

    /// Lets a device do what is to do.
    pub fn process_device(&mut self, key: DeviceKey) {
        if self.parts.devices.process(key, &self.parts.ram.memory)
            && let Err(error) = self.parts.events.raise(ged::Event::Pci)
        {
            log::error!("the guest can't be asked for a device: {error}");
        }
    }

    /// Asks the guest for device `index`.
    ///
    /// # Errors
    ///
    /// Fails if the guest can't be interrupted.
    pub fn remove_device(&mut self, index: usize) -> io::Result<()> {
        if self.parts.devices.ask_for(index, &self.parts.ram.memory) {
            self.parts.events.raise(ged::Event::Pci)?;
        }
        Ok(())
    }

    /// Notices backends that are gone.
    pub fn look_after_devices(&mut self) {
        self.parts.devices.look_after();
    }

    /// How each device is, in order.
    pub fn device_statuses(&self) -> impl Iterator<Item = DeviceStatus> {
        self.parts.devices.statuses()
    }

    /// The devices that have lost their backend since the last time this was asked, and why.
    pub fn take_losses(&mut self) -> Vec<(String, String)> {
        self.parts.devices.take_losses()
    }

    /// Has the backend of device `index` stop and hang up.
    ///
    /// # Errors
    ///
    /// Fails if there is none, or it is lost over it.
    pub fn quiesce_device(&mut self, index: usize) -> Result<(), RequestError> {
        self.parts.devices.quiesce(index)
    }

    /// Gives device `index` another backend.
    ///
    /// # Errors
    ///
    /// Fails if it has one, or the new one does not fit.
    pub fn reconnect_device(
        &mut self,
        index: usize,
        socket: UnixStream,
    ) -> Result<(), RequestError> {
        self.parts.devices.reconnect(index, socket, &self.parts.ram.memory)
    }

    /// Has so many vCPUs be there, as far as the guest plays its part.
    ///
    /// # Errors
    ///
    /// Fails if some have yet to go and more are wanted, or if the guest can't be told.
    pub fn set_cpus(&mut self, cpus: u32) -> Result<(), CpusError> {
        // One that was ejected is of use again only when its thread is out of the guest.
        self.process_cpus();
        self.parts.cpus.set(cpus, &self.vcpus, &self.parts.events)
    }

    /// Does what the guest asks for by the controller of its vCPUs.
    pub fn process_cpus(&mut self) {
        self.untold.extend(self.parts.cpus.process(&self.vcpus));
    }

    /// What the supervisor is to know of what came and went since the last time this was asked.
    pub fn take_untold(&mut self) -> Vec<vmm::Event> {
        let mut events = std::mem::take(&mut self.untold);
        events.extend(hotplug::devices::take_events(&mut self.parts.devices));
        events
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

    /// Has so much RAM be there, as far as the guest plays its part.
    ///
    /// # Errors
    ///
    /// Fails if the host, KVM or a backend has no room for it.
    pub fn set_memory(&mut self, bytes: u64) -> Result<(), SetMemoryError> {
        // What was ejected is of use again only when it is gone.
        self.process_memory();
        let Parts { memory, ram, devices, events, .. } = &mut self.parts;
        memory.set(bytes, ram, devices, events)
    }

    /// Does what the guest asks for by the controller of its RAM.
    pub fn process_memory(&mut self) {
        let Parts { memory, ram, devices, .. } = &mut self.parts;
        self.untold.extend(memory.process(ram, devices));
    }
}
