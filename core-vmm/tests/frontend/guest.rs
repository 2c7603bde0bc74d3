//! A guest without a VM: it drives the device through the bus, as vCPUs and a control loop would.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use core_vmm::bus::BusDevice;
use core_vmm::interrupt::{Gsi, Irqchip, MsiRoute, MsiRouter};
use core_vmm::pci::{AddressRange, Ecam, MmioWindow, PciBus, PciWindows};
use core_vmm::virtio::{Doorbells, Negotiated, RequestError, Services, VirtioDevice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const LOW: u64 = 0xc000_0000;
const HIGH: u64 = 0x10_0000_0000;
const DEADLINE: Duration = Duration::from_secs(20);
const MEMORY_BYTES: usize = 1 << 20;
pub(crate) const QUEUE_SIZE: u16 = 16;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0xc000;
const NOTIFY: u64 = 0x3000;

pub(crate) const CONFIG_VECTOR: u16 = 2;

/// KVM's side, as far as a device sees it.
#[derive(Default)]
pub(crate) struct Chip {
    routes: Mutex<Vec<MsiRoute>>,
    bound: Mutex<Vec<(EventFd, Gsi)>>,
    pub(crate) doorbells: Mutex<Vec<u64>>,
}

impl Chip {
    /// Whether the message `data` was sent since the last look.
    fn take_interrupt(&self, data: u32) -> bool {
        let routes = self.routes.lock().unwrap();
        let lines: Vec<Gsi> = routes
            .iter()
            .filter(|route| route.message.data == data)
            .map(|route| route.gsi)
            .collect();
        let bound = self.bound.lock().unwrap();
        bound.iter().filter(|(_event, gsi)| lines.contains(gsi)).any(|(e, _gsi)| e.read().is_ok())
    }
}

impl Irqchip for Chip {
    fn set_routes(&self, routes: &[MsiRoute]) -> io::Result<()> {
        *self.routes.lock().unwrap() = routes.to_vec();
        Ok(())
    }

    fn bind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        self.bound.lock().unwrap().push((event.try_clone()?, gsi));
        Ok(())
    }

    fn unbind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        // What was not taken is delivered no more, as in KVM; a clone is told by its counter alone,
        // so the line has to do: no test binds two events to one line.
        let _ = event;
        self.bound.lock().unwrap().retain(|(_event, other)| *other != gsi);
        Ok(())
    }
}

impl Doorbells for Chip {
    fn ring_at(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        self.doorbells.lock().unwrap().push(address);
        Ok(())
    }

    fn silence(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        self.doorbells.lock().unwrap().retain(|other| *other != address);
        Ok(())
    }
}

/// A machine with one virtio device in slot 1.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) device: VirtioDevice,
    pub(crate) chip: Arc<Chip>,
    pub(crate) bus: Arc<PciBus>,
    ecam: Ecam,
    window: MmioWindow,
    /// Requests made on each queue since the last reset.
    made: [u16; 2],
}

/// Where a queue's parts are.
fn part(queue: u16, offset: u64) -> u64 {
    0x1_0000 * (1 + u64::from(queue)) + offset
}

/// Where a part of a request is; there are up to eight.
fn buffer(queue: u16, index: u16) -> u64 {
    part(queue, 0x8000 + 0x1000 * u64::from(index))
}

impl Guest {
    pub(crate) fn new(backend: Negotiated) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_BYTES as u64).unwrap();
        let region = (GuestAddress(0), MEMORY_BYTES, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([region]).unwrap();
        let chip = Arc::<Chip>::default();
        let router = Arc::new(MsiRouter::new(Arc::clone(&chip) as Arc<dyn Irqchip>));
        let doorbells = Arc::clone(&chip) as Arc<dyn Doorbells>;
        let device = VirtioDevice::new(backend, &Services { router, doorbells }).unwrap();
        let bus = Arc::new(PciBus::new(PciWindows {
            low: AddressRange { start: LOW, len_bytes: 0x1000_0000 },
            high: AddressRange { start: HIGH, len_bytes: 0x1000_0000 },
        }));
        assert_eq!(bus.attach(device.function()).unwrap().number(), 1);
        let (ecam, window) = (Ecam::new(Arc::clone(&bus)), MmioWindow::low(Arc::clone(&bus)));
        let guest = Self { memory, device, chip, bus, ecam, window, made: [0; 2] };
        guest.set_config(4, &[6, 0]);
        // Enable MSI-X.
        guest.set_config(0x42, &[0, 0x80]);
        for vector in 0..3 {
            guest.set_vector_masked(vector, false);
        }
        guest
    }

    pub(crate) fn config(&self, register: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.ecam.read(1 << 15 | register, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub(crate) fn set_config(&self, register: u64, data: &[u8]) {
        self.ecam.write(1 << 15 | register, data);
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.window.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, len: usize, value: u64) {
        self.window.write(offset, &value.to_le_bytes()[..len]);
    }

    /// Vector n sends 0x40 + n.
    pub(crate) fn set_vector_masked(&self, vector: u16, masked: bool) {
        let entry = TABLE + 16 * u64::from(vector);
        self.write(entry, 8, 0xfee0_0000);
        self.write(entry + 8, 4, 0x40 + u64::from(vector));
        self.write(entry + 12, 4, u64::from(masked));
    }

    pub(crate) fn is_pending(&self, vector: u16) -> bool {
        self.read(PENDING, 8) & 1 << vector != 0
    }

    pub(crate) fn take_interrupt(&self, vector: u16) -> bool {
        self.chip.take_interrupt(0x40 + u32::from(vector))
    }

    pub(crate) fn status(&self) -> u64 {
        self.read(0x14, 1)
    }

    /// Gives the device another backend, as the supervisor does.
    pub(crate) fn reconnect(&mut self, socket: &UnixStream) -> Result<(), RequestError> {
        self.device.reconnect(socket.try_clone().unwrap(), &self.memory)
    }

    /// Runs the control loop until `done` holds.
    pub(crate) fn run_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(self) {
            assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
            let wait = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
            let mut fds = [PollFd::from_borrowed_fd(self.device.ready_fd(), PollFlags::IN)];
            if poll(&mut fds, Some(&wait)).unwrap() > 0 {
                self.device.process(&self.memory);
            }
        }
    }

    /// The control loop has nothing to do.
    pub(crate) fn is_quiet(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(self.device.ready_fd(), PollFlags::IN)];
        poll(&mut fds, Some(&now)).unwrap() == 0
    }

    pub(crate) fn reset(&mut self) {
        self.write(0x14, 1, 0);
        self.run_until("the reset is done", |guest| guest.status() == 0);
        self.made = [0; 2];
    }

    /// Everything up to features, which are all that are on offer but `EVENT_IDX`.
    pub(crate) fn acknowledge(&mut self) {
        self.reset();
        self.write(0x14, 1, 3);
        for half in 0..2 {
            self.write(0, 4, half);
            self.write(8, 4, half);
            let event_idx = if half == 0 { 1 << 29 } else { 0 };
            self.write(0xc, 4, self.read(4, 4) & !event_idx);
        }
        self.write(0x14, 1, 11);
        assert_eq!(self.status(), 11);
        self.write(0x10, 2, CONFIG_VECTOR.into());
    }

    pub(crate) fn set_up_queue(&self, queue: u16, descriptors: u64) {
        self.memory.write_slice(&[0; 0x3000], GuestAddress(part(queue, 0))).unwrap();
        self.write(0x16, 2, queue.into());
        self.write(0x18, 2, QUEUE_SIZE.into());
        self.write(0x1a, 2, queue.into());
        self.write(0x20, 8, descriptors);
        self.write(0x28, 8, part(queue, 0x1000));
        self.write(0x30, 8, part(queue, 0x2000));
        self.write(0x1c, 2, 1);
    }

    /// All that a driver does until it is ready.
    pub(crate) fn bring_up(&mut self) {
        self.acknowledge();
        for queue in 0..u16::try_from(self.read(0x12, 2)).unwrap().min(2) {
            self.set_up_queue(queue, part(queue, 0));
        }
        self.write(0x14, 1, 15);
    }

    /// Makes one request of what the device reads and what it writes, and kicks.
    pub(crate) fn submit_parts(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) {
        let made = &mut self.made[usize::from(queue)];
        let put = |address: u64, bytes: &[u8]| {
            self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        };
        let parts = readable
            .iter()
            .map(|bytes| (bytes.len(), 0_u16))
            .chain(writable.iter().map(|len| (*len, 2)));
        let count = u16::try_from(readable.len() + writable.len()).unwrap();
        for (index, (len, flags)) in (0..count).zip(parts) {
            let at = part(queue, 16 * u64::from(index));
            let more = u16::from(index + 1 < count);
            put(at, &buffer(queue, index).to_le_bytes());
            put(at + 8, &u32::try_from(len).unwrap().to_le_bytes());
            put(at + 12, &(flags | more).to_le_bytes());
            put(at + 14, &(index + 1).to_le_bytes());
        }
        for (index, bytes) in (0..).zip(readable) {
            put(buffer(queue, index), bytes);
        }
        let slot = u64::from(*made % QUEUE_SIZE);
        put(part(queue, 0x1000 + 4 + 2 * slot), &[0, 0]);
        *made += 1;
        put(part(queue, 0x1000 + 2), &made.to_le_bytes());
        self.write(NOTIFY + 4 * u64::from(queue), 2, queue.into());
    }

    /// Says that there are more requests than a ring has room for, and kicks.
    pub(crate) fn break_ring(&self, queue: u16) {
        let index = self.made[usize::from(queue)].wrapping_add(0x4000);
        self.memory.write_obj(index, GuestAddress(part(queue, 0x1000 + 2))).unwrap();
        self.write(NOTIFY + 4 * u64::from(queue), 2, queue.into());
    }

    /// Makes one request of two equal parts and kicks.
    pub(crate) fn submit(&mut self, queue: u16, text: &[u8]) {
        self.submit_parts(queue, &[text], &[text.len()]);
    }

    /// What the device wrote into a part, once all requests are used.
    pub(crate) fn written(&self, queue: u16, index: u16, len: usize) -> Option<Vec<u8>> {
        let used: u16 = self.memory.read_obj(GuestAddress(part(queue, 0x2000 + 2))).unwrap();
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(buffer(queue, index))).unwrap();
        (used == self.made[usize::from(queue)]).then_some(bytes)
    }

    pub(crate) fn answer(&self, queue: u16, len: usize) -> Option<Vec<u8>> {
        self.written(queue, 1, len)
    }

    /// One request, its interrupt and its answer.
    pub(crate) fn request(&mut self, queue: u16, text: &[u8]) -> Vec<u8> {
        self.submit(queue, text);
        self.run_until("the request is answered", |guest| {
            guest.take_interrupt(queue) && guest.answer(queue, text.len()).is_some()
        });
        self.answer(queue, text.len()).unwrap()
    }
}
