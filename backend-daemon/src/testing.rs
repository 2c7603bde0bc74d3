//! The other end of the wire: a frontend and a guest's driver in one value, for tests without KVM.
//!
//! [`Daemon`] runs a backend's real program, jail and all; [`Driver`] connects to its socket,
//! negotiates, owns the guest's memory and queues, and submits requests. Every wait has a
//! deadline and fails the test by a panic.
//!
//! ```no_run
//! # use backend_daemon::testing::{Buffer, Daemon, Driver, Options};
//! let daemon = Daemon::start(env!("CARGO"), &["--disk".as_ref(), "disk.img".as_ref()]);
//! let mut driver = Driver::connect(&daemon.socket(), &Options::default());
//! let answer = driver.request(0, &[Buffer::Out(b"question"), Buffer::In(4)]);
//! ```
#![expect(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test driver fails by panicking"
)]

mod daemon;
mod flood;
mod frontend;
mod memory;
mod moving;
mod queue;
mod sys;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

pub use self::daemon::Daemon;
use self::frontend::{Connection, Inflight, Told};
use self::memory::GuestMemory;
pub use self::memory::Region;
pub use self::moving::DirtyLog;
use self::queue::{Descriptor, GuestQueue};
pub use self::queue::{Malformed, Request};

/// How long any wait may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// How the driver and its frontend set the device up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many queues to use.
    pub queues: u16,
    /// Each queue's size, in descriptors.
    pub queue_size: u16,
    /// Accept `EVENT_IDX`, if offered.
    pub event_idx: bool,
    /// Accept `INDIRECT_DESC`, if offered, and send every chain that way.
    pub indirect: bool,
    /// Which of the other features on offer to accept.
    pub features: u64,
    /// How many bytes of memory the buffers have.
    pub memory_bytes: u64,
    /// Have the device mark its requests in flight, in a region that is kept when it goes.
    pub inflight: bool,
    /// How far behind a 4096-byte boundary each buffer starts.
    pub misaligned_bytes: u64,
    /// When the frontend enables the rings.
    pub enabling: Enabling,
}

/// When a frontend enables its rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enabling {
    /// Each one after all else was said of it.
    Last,
    /// All of them before `SET_FEATURES`, and never again: so QEMU begins with a nic.
    First {
        /// Whether it wants an answer.
        answered: bool,
    },
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 64,
            event_idx: true,
            indirect: false,
            features: u64::MAX,
            memory_bytes: 32 << 20,
            inflight: false,
            misaligned_bytes: 0,
            enabling: Enabling::Last,
        }
    }
}

/// One buffer of a request.
#[derive(Clone, Copy, Debug)]
pub enum Buffer<'a> {
    /// The device reads these bytes.
    Out(&'a [u8]),
    /// The device writes up to this many bytes.
    In(u32),
}

/// What the device made of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How much the device says that it wrote, in bytes.
    pub written_bytes: u32,
    /// The request's `In` buffers, in order, whole.
    pub bytes: Vec<u8>,
}

/// A guest's driver, connected to a daemon under test.
pub struct Driver {
    options: Options,
    connection: Connection,
    memory: GuestMemory,
    queues: Vec<GuestQueue>,
    inflight: Option<Inflight>,
}

impl Driver {
    /// Connects to the daemon on `socket`, which may still be starting, and starts all queues.
    #[must_use]
    pub fn connect(socket: &Path, options: &Options) -> Self {
        Self::adopt(connect_soon(socket), options)
    }

    /// The same over a socket that is connected already.
    #[must_use]
    pub fn adopt(stream: UnixStream, options: &Options) -> Self {
        let memory = GuestMemory::new(options);
        let connection = Connection::new(stream, options).unwrap();
        let queues = (0..options.queues).map(|index| GuestQueue::new(index, options)).collect();
        let mut driver = Self { options: *options, connection, memory, queues, inflight: None };
        driver.set_up(&vec![0; options.queues.into()]).unwrap();
        driver
    }

    fn set_up(&mut self, bases: &[u16]) -> Told<()> {
        self.connection.set_memory(&self.memory)?;
        if self.options.inflight {
            let Options { queue_size, queues, .. } = self.options;
            let region = match self.inflight.take() {
                Some(region) => region,
                None => self.connection.get_inflight(queue_size, queues)?,
            };
            let region = self.inflight.insert(region);
            self.connection.set_inflight(region)?;
        }
        let event_idx = self.connection.has_event_idx();
        for (queue, base) in self.queues.iter_mut().zip(bases) {
            queue.event_idx = event_idx;
            self.connection.start_queue(queue, &self.memory, *base)?;
        }
        Ok(())
    }

    /// The features that were negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.connection.features
    }

    /// Reads from the device's configuration space.
    pub fn config(&mut self, offset: u32, len_bytes: u32) -> Vec<u8> {
        self.connection.config(offset, len_bytes)
    }

    /// Writes to the device's configuration space; gives whether the device's daemon took it.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> bool {
        self.connection.write_config(offset, bytes)
    }

    /// Waits until the device's daemon says that the configuration is another one.
    pub fn hear_of_configuration(&mut self) {
        self.connection.hear_of_configuration();
    }

    /// Tells the device's daemon the driver's view of the device (`SET_STATUS`).
    pub fn set_status(&mut self, status: u64) {
        self.connection.set_status(status).unwrap();
    }

    /// As the daemon knows it (`GET_STATUS`).
    pub fn status(&mut self) -> u64 {
        self.connection.status().unwrap()
    }

    /// The device's state, if the daemon gives it; all queues have to be stopped.
    pub fn save_state(&mut self) -> Option<Vec<u8>> {
        self.connection.save_state().ok()
    }

    /// Gives the device a state; tells whether it took it. All queues have to be stopped.
    pub fn load_state(&mut self, state: &[u8]) -> bool {
        self.connection.load_state(state).is_ok()
    }

    /// Makes a request available and kicks the queue.
    pub fn submit(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> Request {
        let request = self.offer(queue, buffers);
        self.kick(queue);
        request
    }

    /// Makes a request available without a kick.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> Request {
        let indirect = self.connection.has_indirect();
        self.queues[usize::from(queue)].offer(&mut self.memory, buffers, indirect)
    }

    /// Kicks a queue.
    pub fn kick(&mut self, queue: u16) {
        self.queues[usize::from(queue)].kick.write(1).unwrap();
    }

    /// Starts a queue anew with a request that is available again as soon as it is answered. It
    /// goes on until the device is reset.
    pub fn flood(&mut self, queue: u16, buffers: &[Buffer<'_>]) {
        self.stop_queue(queue);
        let base = self.queues[usize::from(queue)].flood(&mut self.memory, buffers);
        self.start_queue(queue, base);
    }

    /// Whether the device wants a kick for what was offered last (`EVENT_IDX`, or the flag).
    #[must_use]
    pub fn wants_kick(&self, queue: u16) -> bool {
        self.queues[usize::from(queue)].wants_kick(&self.memory)
    }

    /// Makes available what no driver would.
    pub fn submit_malformed(&mut self, queue: u16, what: Malformed) {
        self.queues[usize::from(queue)].offer_malformed(&mut self.memory, what);
        self.kick(queue);
    }

    /// Makes a chain of these descriptors available as they are: address, length, device-writable.
    pub fn submit_descriptors(&mut self, queue: u16, descriptors: &[(u64, u32, bool)]) -> Request {
        let chain: Vec<Descriptor> = descriptors
            .iter()
            .map(|(address, len, writable)| Descriptor::new(*address, *len, *writable))
            .collect();
        let request = self.queues[usize::from(queue)].offer_chain(&mut self.memory, &chain);
        self.kick(queue);
        request
    }

    /// Waits for the answer to a request, by interrupts.
    pub fn wait(&mut self, queue: u16, request: Request) -> Answer {
        self.wait_until(queue, Instant::now() + DEADLINE, request)
            .unwrap_or_else(|| panic!("queue {queue}: no answer to {request:?} in time"))
    }

    /// Waits for the answer to a request for no longer than `limit`.
    pub fn wait_for(&mut self, queue: u16, request: Request, limit: Duration) -> Option<Answer> {
        self.wait_until(queue, Instant::now() + limit, request)
    }

    fn wait_until(&mut self, queue: u16, until: Instant, request: Request) -> Option<Answer> {
        let queue = &mut self.queues[usize::from(queue)];
        loop {
            queue.collect(&mut self.memory);
            if let Some(answer) = queue.take(request) {
                return Some(answer);
            }
            if !queue.wait_for_interrupt(&self.memory, until) {
                return None;
            }
        }
    }

    /// Submits a request and waits for its answer: the bytes of its `In` buffers.
    pub fn request(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> Vec<u8> {
        let request = self.submit(queue, buffers);
        self.wait(queue, request).bytes
    }

    /// How many requests of a queue have no answer yet.
    pub fn in_flight(&mut self, queue: u16) -> usize {
        let queue = &mut self.queues[usize::from(queue)];
        queue.collect(&mut self.memory);
        queue.in_flight()
    }

    /// Waits until the device reports an error on a queue (its error descriptor).
    pub fn wait_for_error(&mut self, queue: u16) -> bool {
        self.queues[usize::from(queue)].wait_for_error(Instant::now() + DEADLINE)
    }

    /// `GET_VRING_BASE`: stops a queue once nothing is in flight, and gives where it stands.
    pub fn stop_queue(&mut self, queue: u16) -> u16 {
        self.connection.stop_queue(queue)
    }

    /// Starts a stopped queue at a position.
    pub fn start_queue(&mut self, queue: u16, base: u16) {
        let queue = &self.queues[usize::from(queue)];
        self.connection.start_queue(queue, &self.memory, base).unwrap();
    }

    /// Disables or enables a queue.
    pub fn enable_queue(&mut self, queue: u16, enable: bool) {
        self.connection.enable_queue(queue, enable);
    }

    /// Resets the device as a guest's driver does when it is loaded again: empty rings, all
    /// unanswered requests forgotten.
    pub fn reset(&mut self) {
        self.connection.reset_device();
        self.begin_anew();
    }

    /// Has the driver begin anew, after a reset that the daemon knows of.
    pub fn begin_anew(&mut self) {
        for queue in &mut self.queues {
            queue.clear(&mut self.memory);
        }
        self.set_up(&vec![0; self.options.queues.into()]).unwrap();
    }

    /// Hangs up and connects again, as a frontend does whose backend went: with the same memory
    /// and rings, from where the used rings stand, and with the region of requests in flight.
    pub fn reconnect(&mut self, socket: &Path) {
        self.try_reconnect(connect_soon(socket)).unwrap();
    }

    /// The same to a daemon that may die meanwhile; gives whether it serves.
    pub fn reconnects(&mut self, stream: UnixStream) -> bool {
        self.try_reconnect(stream).is_ok()
    }

    fn try_reconnect(&mut self, stream: UnixStream) -> Told<()> {
        self.connection.hang_up();
        self.connection = Connection::new(stream, &self.options)?;
        let bases: Vec<u16> =
            self.queues.iter().map(|queue| queue.used_index(&self.memory)).collect();
        self.set_up(&bases)
    }

    /// The bytes of the region in which requests in flight are marked.
    #[must_use]
    pub fn inflight_region(&self) -> Vec<u8> {
        self.inflight.as_ref().expect("the options ask for it").bytes()
    }

    /// Marks an unanswered request in flight, as a device does that takes it and dies.
    pub fn mark_in_flight(&mut self, queue: u16, request: Request) {
        let head = self.queues[usize::from(queue)].head(request);
        let region = self.inflight.as_ref().expect("the options ask for it");
        region.mark(queue, head);
    }

    /// Adds a region of memory (`ADD_MEM_REG`); buffers come from it from now on.
    pub fn add_memory(&mut self, bytes: u64) -> Region {
        let region = self.memory.grow(bytes);
        self.connection.add_region(&self.memory, region);
        region
    }

    /// Takes a region away again (`REM_MEM_REG`).
    pub fn remove_memory(&mut self, region: Region) {
        self.remove_memory_in_use(region);
        self.forget_memory(region);
    }

    /// Takes a region away with requests on it; [`Driver::forget_memory`] follows when they are
    /// answered.
    pub fn remove_memory_in_use(&mut self, region: Region) {
        self.connection.remove_region(&self.memory, region);
    }

    /// Uses a region no more that the daemon was told is away.
    pub fn forget_memory(&mut self, region: Region) {
        self.memory.shrink(region);
    }

    /// Sends the whole memory table again (`SET_MEM_TABLE`) while the rings run.
    pub fn resend_memory(&mut self) {
        self.connection.set_memory(&self.memory).unwrap();
    }

    /// Sends bytes that are no message; the daemon is expected to hang up.
    pub fn send_garbage(&mut self, bytes: &[u8]) {
        self.connection.send_garbage(bytes);
    }
}

/// Connects to a socket that may not be there yet.
pub fn connect_soon(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "cannot connect: {error}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
}
