//! The VM's devices: virtio ones, connected to their backends, and the host's; put on the PCI bus,
//! reset together.

use std::{
    io,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::PathBuf,
    sync::Arc,
};

use kvm_ioctls::VmFd;
use nacre_proto::vmm::{DeviceState, DeviceStatus};
use vfio::{Opened, Sysfs, group};
use vm_memory::GuestMemoryMmap;

use crate::{
    bus::{BusBuilder, BusError, PCI_CONFIG_PORT},
    config::{self, AssignedConfig, Endpoint},
    interrupt::MsiRouter,
    memory::{layout, slots::Slots},
    passthrough::{self, AssignError, Assigned, Trouble},
    pci::{
        AddressRange, ConfigPorts, ECAM_LEN_BYTES, Ecam, MmioWindow, PciBus, PciError, PciWindows,
    },
    sys,
    virtio::{
        ConnectError, DeviceConfig, DeviceError, DeviceKind, Negotiated, RequestError, Services,
        VirtioDevice, Watchdog, connect_all,
    },
};

const PCI_CONFIG_PORTS: u64 = 8;

/// Why a device is missing.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// Nobody listens.
    #[error("can't connect device {id} to {}", path.display())]
    Unreachable {
        /// Which device.
        id: String,
        /// Its backend's socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The descriptor is none.
    #[error("descriptor {fd} of device {id} is unusable")]
    Descriptor {
        /// Which device.
        id: String,
        /// The number.
        fd: i32,
        /// Why.
        source: io::Error,
    },
    /// The thread that bounds conversations.
    #[error("can't start the backends' watchdog")]
    Watchdog(#[source] io::Error),
    /// A backend does not answer, or not as it should.
    #[error("no backend")]
    Connect(#[from] ConnectError),
    /// No descriptors.
    #[error("device {id}")]
    Device {
        /// Which device.
        id: String,
        /// Why.
        source: DeviceError,
    },
    /// The host's device.
    #[error("device {id}")]
    Assign {
        /// Which device.
        id: String,
        /// Why.
        source: AssignError,
    },
    /// No place on the bus.
    #[error("device {id} has no place on the bus")]
    Slot {
        /// Which device.
        id: String,
        /// Why.
        source: PciError,
    },
}

/// All devices and their bus.
pub struct Devices {
    bus: Arc<PciBus>,
    router: Arc<MsiRouter>,
    all: Vec<Attached>,
}

/// A device in its place.
struct Attached {
    device: Device,
    /// Where the guest finds it.
    address: String,
}

enum Device {
    Virtio(VirtioDevice),
    /// Boxed, as it is much larger.
    Assigned(Box<Assigned>),
}

impl Attached {
    fn as_virtio(&self) -> Option<&VirtioDevice> {
        match &self.device {
            Device::Virtio(device) => Some(device),
            Device::Assigned(_) => None,
        }
    }

    fn as_virtio_mut(&mut self) -> Option<&mut VirtioDevice> {
        match &mut self.device {
            Device::Virtio(device) => Some(device),
            Device::Assigned(_) => None,
        }
    }

    fn as_assigned_mut(&mut self) -> Option<&mut Assigned> {
        match &mut self.device {
            Device::Virtio(_) => None,
            Device::Assigned(device) => Some(device),
        }
    }

    fn status(&self) -> DeviceStatus {
        match &self.device {
            Device::Virtio(device) => device.status(&self.address),
            Device::Assigned(device) => DeviceStatus {
                id: device.name().to_owned(),
                address: self.address.clone(),
                state: DeviceState::Passthrough,
                leaving: false,
                reconnects: 0,
            },
        }
    }
}

/// Connects to all backends and negotiates with them, side by side.
///
/// # Errors
///
/// Fails if a backend can't be reached or does not fit.
pub fn connect(
    configs: &[config::DeviceConfig],
    prepare_watchdog: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<Vec<Negotiated>, DevicesError> {
    if configs.is_empty() {
        return Ok(Vec::new());
    }
    let sockets = configs
        .iter()
        .map(|config| Ok((wanted(config), open(config)?)))
        .collect::<Result<_, DevicesError>>()?;
    let watchdog = Watchdog::start(prepare_watchdog).map_err(DevicesError::Watchdog)?;
    Ok(connect_all(sockets, &watchdog)?)
}

fn wanted(config: &config::DeviceConfig) -> DeviceConfig {
    let mut wanted = DeviceConfig::new(&config.id, DeviceKind(config.device_type));
    wanted.queues = config.queues;
    wanted.queue_size = config.queue_size.unwrap_or(wanted.queue_size);
    wanted.config_bytes.clone_from(&config.config_space);
    wanted
}

fn open(config: &config::DeviceConfig) -> Result<UnixStream, DevicesError> {
    let id = || config.id.clone();
    match &config.endpoint {
        Endpoint::Socket(path) => UnixStream::connect(path)
            .map_err(|source| DevicesError::Unreachable { id: id(), path: path.clone(), source }),
        Endpoint::Fd(fd) => sys::inherited_fd(*fd)
            .map(UnixStream::from)
            .map_err(|source| DevicesError::Descriptor { id: id(), fd: *fd, source }),
    }
}

/// A device of the host's, opened here or handed in.
fn open_assigned(config: &AssignedConfig) -> Result<Opened, DevicesError> {
    let id = || config.id.clone();
    let Some([container, group, device]) = config.fds else {
        return group::open(&Sysfs::default(), config.address)
            .map_err(|error| DevicesError::Assign { id: id(), source: error.into() });
    };
    let own = |fd| {
        sys::inherited_fd(fd).map_err(|source| DevicesError::Descriptor { id: id(), fd, source })
    };
    Ok(Opened { container: own(container)?, group: own(group)?, device: own(device)? })
}

fn failed(device: &Assigned) -> impl FnOnce(AssignError) -> DevicesError + use<> {
    let id = device.name().to_owned();
    |source| DevicesError::Assign { id, source }
}

impl Devices {
    /// Puts each on the bus, in the order given.
    ///
    /// # Errors
    ///
    /// Fails if there is no room for one.
    pub fn attach(
        backends: Vec<Negotiated>,
        vm: &Arc<VmFd>,
        address_bits: u32,
    ) -> Result<Self, DevicesError> {
        let range = |range: std::ops::Range<u64>| AddressRange {
            start: range.start,
            len_bytes: range.end - range.start,
        };
        let bus = Arc::new(PciBus::new(PciWindows {
            low: range(layout::PCI_WINDOW_32),
            high: range(layout::pci_window_64(address_bits)),
        }));
        let irqchip = Arc::clone(vm);
        let doorbells = Arc::clone(vm);
        let router = Arc::new(MsiRouter::new(irqchip));
        let services = Services { router: Arc::clone(&router), doorbells };
        let mut all = Vec::with_capacity(backends.len());
        for backend in backends {
            let id = backend.kept().config.id.clone();
            let device = VirtioDevice::new(backend, &services)
                .map_err(|source| DevicesError::Device { id: id.clone(), source })?;
            let slot = bus
                .attach(device.function())
                .map_err(|source| DevicesError::Slot { id: id.clone(), source })?;
            log::info!("device {id} is in slot {}", slot.number());
            let address = format!("0000:00:{:02x}.0", slot.number());
            all.push(Attached { device: Device::Virtio(device), address });
        }
        Ok(Self { bus, router, all })
    }

    /// Puts the host's devices on the bus, in the order given, after the others.
    ///
    /// # Errors
    ///
    /// Fails if one can't be had, or there is no room for it.
    pub fn assign(
        &mut self,
        configs: &[AssignedConfig],
        vm: &Arc<VmFd>,
        slots: &Slots,
        memory: &GuestMemoryMmap,
    ) -> Result<(), DevicesError> {
        let services = passthrough::Services::new(vm, slots, &self.router);
        for config in configs {
            let id = || config.id.clone();
            let device = Assigned::new(&config.id, open_assigned(config)?, &services, memory)
                .map_err(|source| DevicesError::Assign { id: id(), source })?;
            let slot = self
                .bus
                .attach(device.function())
                .map_err(|source| DevicesError::Slot { id: id(), source })?;
            let number = slot.number();
            log::info!("device {} is {} of the host, in slot {number}", config.id, config.address);
            let address = format!("0000:00:{number:02x}.0");
            self.all.push(Attached { device: Device::Assigned(Box::new(device)), address });
        }
        Ok(())
    }

    /// Puts the PCI bus where vCPUs find it.
    ///
    /// # Errors
    ///
    /// Fails if something else is there.
    pub fn register(&self, pio: &mut BusBuilder, mmio: &mut BusBuilder) -> Result<(), BusError> {
        let bus = || Arc::clone(&self.bus);
        pio.insert(PCI_CONFIG_PORT, PCI_CONFIG_PORTS, Arc::new(ConfigPorts::new(bus())))?;
        mmio.insert(layout::ECAM.start, ECAM_LEN_BYTES, Arc::new(Ecam::new(bus())))?;
        for window in [MmioWindow::low(bus()), MmioWindow::high(bus())] {
            let range = window.range();
            mmio.insert(range.start, range.len_bytes, Arc::new(window))?;
        }
        Ok(())
    }

    /// What is readable when a device wants [`Devices::process`], in order.
    pub fn ready_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.all.iter().map(|attached| match &attached.device {
            Device::Virtio(device) => device.ready_fd(),
            Device::Assigned(device) => device.ready_fd(),
        })
    }

    /// Lets device `index` do what is to do.
    pub fn process(&mut self, index: usize, memory: &GuestMemoryMmap) {
        let Some(attached) = self.all.get_mut(index) else { return };
        match &mut attached.device {
            Device::Virtio(device) => device.process(memory),
            Device::Assigned(device) => match device.process() {
                Some(Trouble::Wanted) => log::warn!("the host wants {} back", device.name()),
                Some(Trouble::Error) | None => {}
            },
        }
    }

    /// Notices backends that are gone.
    pub fn look_after(&mut self) {
        for device in self.all.iter_mut().filter_map(Attached::as_virtio_mut) {
            device.look_after_backend();
        }
    }

    /// How each is, in order.
    pub fn statuses(&self) -> impl Iterator<Item = DeviceStatus> {
        self.all.iter().map(Attached::status)
    }

    /// Whether no process that was a backend may still write to the guest's memory.
    #[must_use]
    pub fn are_still(&self) -> bool {
        self.all.iter().filter_map(Attached::as_virtio).all(VirtioDevice::is_still)
    }

    /// The devices that have lost their backend since the last time this was asked, and why.
    pub fn take_losses(&mut self) -> Vec<(String, String)> {
        let loss =
            |device: &mut VirtioDevice| Some((device.name().to_owned(), device.take_loss()?));
        self.all.iter_mut().filter_map(Attached::as_virtio_mut).filter_map(loss).collect()
    }

    /// Has the backend of device `index` stop and hang up.
    ///
    /// # Errors
    ///
    /// Fails if there is none, or it is lost over it.
    pub fn quiesce(&mut self, index: usize) -> Result<(), RequestError> {
        self.virtio(index)?.quiesce()
    }

    /// Gives device `index` another backend.
    ///
    /// # Errors
    ///
    /// Fails if it has one, or the new one does not fit.
    pub fn reconnect(
        &mut self,
        index: usize,
        socket: UnixStream,
        memory: &GuestMemoryMmap,
    ) -> Result<(), RequestError> {
        self.virtio(index)?.reconnect(socket, memory)
    }

    fn virtio(&mut self, index: usize) -> Result<&mut VirtioDevice, RequestError> {
        let attached = self.all.get_mut(index);
        attached.and_then(Attached::as_virtio_mut).ok_or(RequestError::Absent)
    }

    /// Back to power-on, with every vCPU stopped; backends keep their connections, and the host's
    /// devices reach no memory until [`Devices::resume`].
    ///
    /// # Errors
    ///
    /// Fails if a device of the host's may still write to the guest's memory.
    pub fn reset(&mut self) -> Result<(), DevicesError> {
        for attached in &mut self.all {
            match &mut attached.device {
                Device::Virtio(device) => device.reset(),
                Device::Assigned(device) => device.reset().map_err(failed(device))?,
            }
        }
        self.bus.reset();
        Ok(())
    }

    /// The guest's memory is as it is to be: the host's devices reach it again.
    ///
    /// # Errors
    ///
    /// Fails if the host does not allow it.
    pub fn resume(&mut self, memory: &GuestMemoryMmap) -> Result<(), DevicesError> {
        let mut assigned = self.all.iter_mut().filter_map(Attached::as_assigned_mut);
        assigned.try_for_each(|device| device.resume(memory).map_err(failed(device)))
    }
}
