//! The half of a passed-through device that the control thread owns.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use vfio::config_space::ConfigSpace;
use vfio::{Container, Device, DmaMap, DmaRange, InterruptKind, Opened, RegionIndex, bar};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::function::{AssignedFunction, Parts, Shown};
use super::interrupts::Interrupts;
use super::kvm::KvmVfio;
use super::line::{self, Line};
use super::sys::Window;
use super::{AssignError, Services, event};
use crate::error_chain;
use crate::interrupt::descriptor;
use crate::pci::{PciFunction, Slot};

/// The longest configuration space.
const CONFIG_BYTES: u64 = 4096;
const COMMAND: u64 = 4;
/// Memory decoding.
const COMMAND_MEMORY: u8 = 1 << 1;

/// What the host says of a device that is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The device reported an error from which it can't recover.
    Error,
    /// The host wants the device back: somebody takes the driver away from it.
    Wanted,
}

/// A device of the host's, its function on the bus included. Dropped, it is reset and the host's
/// again; the bus has to have let go of the function before.
pub struct Assigned {
    name: String,
    device: Arc<Device>,
    function: Arc<AssignedFunction>,
    dma: DmaMap,
    /// Open for as long as the device is ours.
    group: OwnedFd,
    kvm: Arc<KvmVfio>,
    /// Written by the kernel.
    error: EventFd,
    /// Written by the kernel.
    wanted: EventFd,
    ready: OwnedFd,
}

impl Assigned {
    /// Takes a device over and lets it reach all of `memory`, which is pinned by that.
    ///
    /// # Errors
    ///
    /// Fails if the descriptors are no device, or the host or KVM does not allow it.
    pub fn new(
        name: &str,
        opened: Opened,
        services: &Services,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, AssignError> {
        let container = Container::from_fd(opened.container)?;
        let device = Arc::new(Device::new(opened.device)?);
        let function = Arc::new(function(name, &device, services)?);
        let (error, wanted) = (event()?, event()?);
        for (kind, event) in [(InterruptKind::Error, &error), (InterruptKind::Request, &wanted)] {
            if device.interrupts(kind) > 0 {
                device.send_to(kind, 0, &[Some(event)])?;
            }
        }
        let ready =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| not_made(error.into()))?;
        for event in [&error, &wanted] {
            let token = epoll::EventData::new_u64(0);
            epoll::add(&ready, descriptor(event), token, epoll::EventFlags::IN)
                .map_err(|error| not_made(error.into()))?;
        }
        services.kvm.add(opened.group.as_fd()).map_err(AssignError::Kvm)?;
        let kvm = Arc::clone(&services.kvm);
        let (name, group) = (name.to_owned(), opened.group);
        let dma = DmaMap::new(container);
        let mut assigned = Self { name, device, function, dma, group, kvm, error, wanted, ready };
        assigned.resume(memory)?;
        Ok(assigned)
    }

    /// The supervisor's name for it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What to attach to the bus.
    #[must_use]
    pub fn function(&self) -> Arc<dyn PciFunction> {
        Arc::clone(&self.function) as Arc<dyn PciFunction>
    }

    /// It is in this slot now, which decides where its legacy interrupt goes.
    pub fn placed(&self, slot: Slot) {
        self.function.connect_line(line::pin_of(slot));
    }

    /// Readable when [`Assigned::process`] has something to do; it is always the same one.
    #[must_use]
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// Hears what the host has to say of the device.
    pub fn process(&self) -> Option<Trouble> {
        if self.error.read().is_ok() {
            log::error!("{}: the device reported an error from which it can't recover", self.name);
            return Some(Trouble::Error);
        }
        // The kernel repeats its wish every few seconds.
        self.wanted.read().is_ok().then_some(Trouble::Wanted)
    }

    /// Lets the device reach `region`, which is RAM that was added.
    ///
    /// # Errors
    ///
    /// Fails if it is reached already, or the host does not allow it.
    pub fn add_memory(&mut self, region: &GuestRegionMmap) -> Result<(), AssignError> {
        let start = region.start_addr().0;
        let slice = region.as_volatile_slice().map_err(|_error| AssignError::Memory(start))?;
        Ok(self.dma.add(start, &slice)?)
    }

    /// Whether the device reaches the memory at `start`: not while the VM is reset.
    #[must_use]
    pub fn reaches(&self, start: GuestAddress) -> bool {
        self.dma.reaches(start.0)
    }

    /// The device reaches RAM that is to go no longer.
    ///
    /// # Errors
    ///
    /// Fails if that was not added as one region, or the IOMMU refuses.
    pub fn remove_memory(
        &mut self,
        start: GuestAddress,
        len_bytes: u64,
    ) -> Result<(), AssignError> {
        Ok(self.dma.remove(DmaRange { start: start.0, len_bytes })?)
    }

    /// Back to power-on, with every vCPU stopped; the bus resets the configuration. The device
    /// reaches no memory until [`Assigned::resume`]: what a reset of the VM does to the guest's
    /// memory gives it new pages.
    ///
    /// # Errors
    ///
    /// Fails if the device is as it was: it may still write to the guest's memory.
    pub fn reset(&mut self) -> Result<(), AssignError> {
        self.function.power_on();
        self.reset_device();
        Ok(self.dma.clear()?)
    }

    /// Lets the device reach all of `memory` again.
    ///
    /// # Errors
    ///
    /// Fails if the host does not allow it.
    pub fn resume(&mut self, memory: &GuestMemoryMmap) -> Result<(), AssignError> {
        self.function.resume();
        memory.iter().try_for_each(|region| self.add_memory(region))
    }

    /// By itself, or with all of its group where it can't be.
    fn reset_device(&self) {
        let reset = if self.device.can_reset() {
            self.device.reset()
        } else {
            self.device.hot_reset(&[self.group.as_fd()])
        };
        if let Err(error) = reset.and_then(|()| decode_memory(&self.device)) {
            // It reaches no memory meanwhile, and closing it resets it too.
            log::warn!("{}: {}", self.name, error_chain(&error));
        }
    }
}

/// Has the device decode its memory, which it does for as long as it is ours.
fn decode_memory(device: &Device) -> Result<(), vfio::DeviceError> {
    let mut command = [0; 2];
    device.read(RegionIndex::CONFIG, COMMAND, &mut command)?;
    command[0] |= COMMAND_MEMORY;
    device.write(RegionIndex::CONFIG, COMMAND, &command)
}

fn not_made(source: io::Error) -> AssignError {
    AssignError::Host { what: "an epoll instance", source }
}

/// The half that goes onto the bus.
fn function(
    name: &str,
    device: &Arc<Device>,
    services: &Services,
) -> Result<AssignedFunction, AssignError> {
    let len = device.region(RegionIndex::CONFIG).len_bytes.min(CONFIG_BYTES);
    let mut said = vec![0; usize::try_from(len).unwrap_or(0)];
    device.read(RegionIndex::CONFIG, 0, &mut said)?;
    decode_memory(device)?;
    let size = |index: usize| {
        let index = u8::try_from(index).unwrap_or(u8::MAX);
        device.region(RegionIndex::bar(index)).len_bytes
    };
    let line = Line::new(Arc::clone(&services.vm), Arc::clone(device))?;
    let config = ConfigSpace::new(&said, std::array::from_fn(size), line.is_some());
    let counts = [config.msix().map_or(0, |msix| msix.vectors), config.msi_vectors()];
    let interrupts = Interrupts::new(name, Arc::clone(device), &services.router, counts, line)?;
    let shown = windows(device, &config, services)?;
    let (name, device) = (name.to_owned(), Arc::clone(device));
    Ok(AssignedFunction::new(Parts { name, device, config, interrupts, shown }))
}

/// All parts of BARs that a guest may reach without a trap.
fn windows(
    device: &Device,
    config: &ConfigSpace,
    services: &Services,
) -> Result<Vec<Shown>, AssignError> {
    let mut shown = Vec::new();
    for bar in config.bars() {
        let index = RegionIndex::bar(bar.index);
        let region = device.region(index);
        let trapped = config.msix().map_or_else(Vec::new, |msix| msix.trapped(bar.index));
        for area in bar::mapped_areas(region.len_bytes, &region.mappable, &trapped) {
            let mapping = device.map(index, area)?;
            let slot = services.slots.take()?;
            let window = Window::new(Arc::clone(&services.vm), slot, mapping);
            shown.push(Shown { bar: bar.index, offset: area.offset, window });
        }
    }
    Ok(shown)
}

impl Drop for Assigned {
    fn drop(&mut self) {
        self.function.silence();
        self.reset_device();
        if let Err(error) = self.kvm.remove(self.group.as_fd()) {
            log::warn!("{}: KVM does not forget the device: {error}", self.name);
        }
    }
}

impl fmt::Debug for Assigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Assigned").field("name", &self.name).finish_non_exhaustive()
    }
}
