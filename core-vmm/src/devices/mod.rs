//! The VM's devices: connected to their backends, put on the PCI buses, reset together, taken off
//! again. How that goes while the guest runs is told in [`hotplug::devices`](crate::hotplug).

pub mod boot;
mod device;
mod memory;

use std::{
    io,
    ops::Range,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::PathBuf,
    sync::Arc,
};

use kvm_ioctls::VmFd;
use nacre_proto::vmm::DeviceStatus;
use vfio::Opened;
use vm_memory::GuestMemoryMmap;

pub use self::device::Device;
use crate::{
    acpi::pci_hotplug::{News, PciHotplug},
    bus::{BusBuilder, BusError, PCI_CONFIG_PORT},
    event::Notifier,
    interrupt::MsiRouter,
    memory::{layout, slots::Slots},
    passthrough::{self, AssignError, Assigned},
    pci::{
        AddressRange, ConfigPorts, ECAM_LEN_BYTES, Ecam, MmioWindow, PciAddress, PciError, PciRoot,
        PciWindows,
    },
    virtio::{
        ConnectError, DeviceConfig, DeviceError, FrontendError, Negotiated, RequestError, Services,
        VirtioDevice, Watchdog, connect,
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
    /// A backend does not answer, or not as it should.
    #[error("no backend")]
    Connect(#[from] ConnectError),
    /// The backend that came with a device.
    #[error("device {id} has no backend")]
    Backend {
        /// Which device.
        id: String,
        /// Why.
        source: FrontendError,
    },
    /// The control loop can't hear of it.
    #[error("device {id} can't be watched")]
    Unwatched {
        /// Which device.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// The guest has more RAM than the backend can have.
    #[error("the backend of {id} takes {most} regions of memory, and the guest has {wanted}")]
    Regions {
        /// Which device.
        id: String,
        /// The most.
        most: usize,
        /// As there are.
        wanted: usize,
    },
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

/// Names a device for as long as the VM lives: no other one ever has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceKey(pub u64);

/// All devices and their buses.
pub struct Devices {
    hotplug: Arc<PciHotplug>,
    services: Services,
    passthrough: passthrough::Services,
    watchdog: Watchdog,
    /// In the order in which they came.
    all: Vec<Entry>,
    /// The next one's key.
    next: u64,
}

struct Entry {
    key: DeviceKey,
    address: PciAddress,
    device: Device,
}

/// So many empty segments for a guest with so many address bits.
#[must_use]
pub fn pci(segments: u16, address_bits: u32, notifier: &Arc<Notifier>) -> PciHotplug {
    let windows = (0..segments).map(|segment| PciWindows {
        low: range(if segment == 0 { layout::PCI_WINDOW_32 } else { 0..0 }),
        high: range(layout::pci_window_64_of(segment, segments, address_bits)),
    });
    PciHotplug::new(PciRoot::new(windows), Arc::clone(notifier))
}

impl Devices {
    /// No devices yet; `watchdog` bounds what backends may take.
    #[must_use]
    pub fn new(hotplug: PciHotplug, (vm, slots): (&Arc<VmFd>, &Slots), watchdog: Watchdog) -> Self {
        let irqchip = Arc::clone(vm);
        let doorbells = Arc::clone(vm);
        let router = Arc::new(MsiRouter::new(irqchip));
        let passthrough = passthrough::Services::new(vm, slots, &router);
        let services = Services { router, doorbells };
        let hotplug = Arc::new(hotplug);
        Self { hotplug, services, passthrough, watchdog, all: Vec::new(), next: 0 }
    }

    /// Puts one on a bus before the guest runs.
    ///
    /// # Errors
    ///
    /// Fails if there is no room for it.
    pub fn place(&mut self, device: Device) -> Result<(), DevicesError> {
        let id = || device.name().to_owned();
        let address = self
            .hotplug
            .place(&device.function())
            .map_err(|source| DevicesError::Slot { id: id(), source })?;
        device.placed(address);
        log::info!("device {} is at {address}", device.name());
        let key = self.next_key();
        self.all.push(Entry { key, address, device });
        Ok(())
    }

    /// Puts one on a bus while the guest runs, which is to be told. `watch` begins to watch what
    /// [`Device::ready_fd`] gives.
    ///
    /// # Errors
    ///
    /// Fails if there is no room for it, or it can't be watched; it is gone then.
    pub fn plug(
        &mut self,
        device: Device,
        watch: impl FnOnce(DeviceKey, BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<PciAddress, DevicesError> {
        let id = || device.name().to_owned();
        let key = self.next_key();
        // The descriptor leaves the set it is watched in when it is closed.
        watch(key, device.ready_fd())
            .map_err(|source| DevicesError::Unwatched { id: id(), source })?;
        let address = self
            .hotplug
            .plug(&device.function())
            .map_err(|source| DevicesError::Slot { id: id(), source })?;
        device.placed(address);
        log::info!("device {} was added at {address}", device.name());
        self.all.push(Entry { key, address, device });
        Ok(address)
    }

    /// A device whose backend is at the other end of `socket`, on no bus yet.
    ///
    /// # Errors
    ///
    /// Fails if the backend does not answer in time, or does not fit.
    pub fn negotiate(
        &self,
        config: DeviceConfig,
        socket: UnixStream,
    ) -> Result<Device, DevicesError> {
        let id = config.id.clone();
        let backend = connect(config, socket, &self.watchdog)
            .map_err(|source| DevicesError::Backend { id, source })?;
        self.virtio(backend)
    }

    /// The device of a backend that is negotiated, on no bus yet.
    ///
    /// # Errors
    ///
    /// Fails if the host has no descriptors left.
    pub fn virtio(&self, backend: Negotiated) -> Result<Device, DevicesError> {
        let id = backend.kept().config.id.clone();
        VirtioDevice::new(backend, &self.services)
            .map(|device| Device::Virtio(Box::new(device)))
            .map_err(|source| DevicesError::Device { id, source })
    }

    /// A device of the host's, on no bus yet.
    ///
    /// # Errors
    ///
    /// Fails if the descriptors are no device, or the host does not allow it.
    pub fn assigned(
        &self,
        id: &str,
        opened: Opened,
        memory: &GuestMemoryMmap,
    ) -> Result<Device, DevicesError> {
        Assigned::new(id, opened, &self.passthrough, memory)
            .map(|device| Device::Assigned(Box::new(device)))
            .map_err(|source| DevicesError::Assign { id: id.to_owned(), source })
    }

    fn next_key(&mut self) -> DeviceKey {
        self.next += 1;
        DeviceKey(self.next - 1)
    }

    /// Puts the PCI buses and the hotplug registers where vCPUs find them.
    ///
    /// # Errors
    ///
    /// Fails if something else is there.
    pub fn register(&self, pio: &mut BusBuilder, mmio: &mut BusBuilder) -> Result<(), BusError> {
        for (segment, bus) in (0..).zip(self.hotplug.root().segments()) {
            if segment == 0 {
                let ports = Arc::new(ConfigPorts::new(Arc::clone(bus)));
                pio.insert(PCI_CONFIG_PORT, PCI_CONFIG_PORTS, ports)?;
            }
            let ecam = Arc::new(Ecam::new(Arc::clone(bus)));
            mmio.insert(layout::ecam(segment).start, ECAM_LEN_BYTES, ecam)?;
            for window in [MmioWindow::low(Arc::clone(bus)), MmioWindow::high(Arc::clone(bus))] {
                let range = window.range();
                if range.len_bytes > 0 {
                    mmio.insert(range.start, range.len_bytes, Arc::new(window))?;
                }
            }
        }
        let registers = range(layout::PCI_HOTPLUG);
        let hotplug = Arc::clone(&self.hotplug);
        mmio.insert(registers.start, registers.len_bytes, hotplug)
    }

    /// What is readable when a device wants [`Devices::process`].
    pub fn ready_fds(&self) -> impl Iterator<Item = (DeviceKey, BorrowedFd<'_>)> {
        self.all.iter().map(|entry| (entry.key, entry.device.ready_fd()))
    }

    /// Lets a device do what is to do, if it is still there. True if the next event asks the guest
    /// for it, because the host wants it back.
    pub fn process(&mut self, key: DeviceKey, memory: &GuestMemoryMmap) -> bool {
        let Some(entry) = self.all.iter_mut().find(|entry| entry.key == key) else { return false };
        if !entry.device.process(memory) || !self.hotplug.ask_for(entry.address) {
            return false;
        }
        log::warn!("the host wants {} back, and the guest is asked for it", entry.device.name());
        true
    }

    /// Notices backends that are gone.
    pub fn look_after(&mut self) {
        for entry in &mut self.all {
            entry.device.look_after();
        }
    }

    /// How each is, in the order in which they came.
    pub fn statuses(&self) -> impl Iterator<Item = DeviceStatus> {
        self.all.iter().map(|entry| {
            let leaving = self.hotplug.is_leaving(entry.address);
            DeviceStatus { leaving, ..entry.device.status(entry.address) }
        })
    }

    /// Whether no process that was a backend may still write to the guest's memory.
    #[must_use]
    pub fn are_still(&self) -> bool {
        self.all.iter().all(|entry| entry.device.is_still())
    }

    /// The devices that have lost their backend since the last time this was asked, and why.
    pub fn take_losses(&mut self) -> Vec<(String, String)> {
        let loss = |entry: &mut Entry| {
            let loss = entry.device.take_loss()?;
            Some((entry.device.name().to_owned(), loss))
        };
        self.all.iter_mut().filter_map(loss).collect()
    }

    /// Has the backend of device `index` stop and hang up.
    ///
    /// # Errors
    ///
    /// Fails if there is none, or it is lost over it.
    pub fn quiesce(&mut self, index: usize) -> Result<(), RequestError> {
        self.all.get_mut(index).ok_or(RequestError::Absent)?.device.quiesce()
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
        let entry = self.all.get_mut(index).ok_or(RequestError::Absent)?;
        entry.device.reconnect(socket, memory)
    }

    /// The next event asks the guest for device `index`. Where that is lost, what served it has
    /// ended. False if the guest was asked already.
    pub fn ask_for(&mut self, index: usize, memory: &GuestMemoryMmap) -> bool {
        let Some(entry) = self.all.get_mut(index) else { return false };
        let asked = self.hotplug.ask_for(entry.address);
        if asked {
            entry.device.predecessor_ended(memory);
        }
        asked
    }

    /// What the guest made of it: the devices it gave up stop, those it keeps come with the status
    /// it gave.
    pub fn take_answers(&mut self) -> Vec<(String, u32)> {
        let mut kept = Vec::new();
        for news in self.hotplug.take_news() {
            let (News::Ejected(address) | News::Kept { address, .. }) = news;
            let Some(entry) = self.all.iter_mut().find(|entry| entry.address == address) else {
                continue;
            };
            match news {
                // A driver that was asked nicely has reset it already.
                News::Ejected(_) => entry.device.stop(),
                News::Kept { status, .. } => kept.push((entry.device.name().to_owned(), status)),
            }
        }
        kept
    }

    /// Lets go of the devices that the guest gave up and that are still, and gives their names.
    pub fn remove_ejected(&mut self) -> Vec<String> {
        let hotplug = Arc::clone(&self.hotplug);
        self.remove(|entry| hotplug.is_ejected(entry.address) && entry.device.is_still())
    }

    /// Lets go of all devices that the guest was asked for, at its reset.
    pub fn remove_leaving(&mut self) -> Vec<String> {
        let hotplug = Arc::clone(&self.hotplug);
        self.remove(|entry| hotplug.is_leaving(entry.address))
    }

    fn remove(&mut self, is_to_go: impl Fn(&Entry) -> bool) -> Vec<String> {
        let gone: Vec<_> = self.all.extract_if(.., |entry| is_to_go(entry)).collect();
        gone.into_iter().map(|entry| self.let_go(entry)).collect()
    }

    fn let_go(&self, entry: Entry) -> String {
        self.hotplug.finish(entry.address);
        let name = entry.device.name().to_owned();
        drop(entry);
        let routes = self.services.router.in_use();
        log::info!("device {name} is gone, {routes} interrupt routes are in use");
        name
    }

    /// Back to power-on, with every vCPU stopped; backends keep their connections, and the host's
    /// devices reach no memory until [`Devices::resume`].
    ///
    /// # Errors
    ///
    /// Fails if a device of the host's may still write to the guest's memory.
    pub fn reset(&mut self) -> Result<(), DevicesError> {
        for entry in &mut self.all {
            entry.device.reset()?;
        }
        self.hotplug.reset();
        Ok(())
    }

    /// The guest's memory is as it is to be: the host's devices reach it again.
    ///
    /// # Errors
    ///
    /// Fails if the host does not allow it.
    pub fn resume(&mut self, memory: &GuestMemoryMmap) -> Result<(), DevicesError> {
        self.all.iter_mut().try_for_each(|entry| entry.device.resume(memory))
    }
}

fn range(range: Range<u64>) -> AddressRange {
    AddressRange { start: range.start, len_bytes: range.end - range.start }
}
