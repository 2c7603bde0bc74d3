//! A backend by other hands: `vhost-user-backend`, with a device that answers in capitals.

use std::io;
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
const RING_PACKED: u64 = 1 << 34;

/// What the backend is like.
#[derive(Clone)]
pub(crate) struct Manner {
    pub(crate) features: u64,
    pub(crate) protocol: VhostUserProtocolFeatures,
    pub(crate) queues: usize,
    pub(crate) config: [u8; 8],
    /// It never comes back from the memory table until told so.
    pub(crate) hangs: Option<Arc<Hang>>,
}

#[derive(Default)]
pub(crate) struct Hang {
    over: Mutex<bool>,
    changed: Condvar,
}

impl Hang {
    pub(crate) fn end(&self) {
        *self.over.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let over = self.over.lock().unwrap();
        drop(self.changed.wait_while(over, |over| !*over).unwrap());
    }
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            features: VERSION_1 | PROTOCOL_FEATURES | RING_PACKED | 1 << 5,
            protocol: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::RESET_DEVICE,
            queues: 2,
            config: *b"echo0123",
            hangs: None,
        }
    }
}

/// What the backend saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) features: Mutex<Vec<u64>>,
    pub(crate) resets: AtomicU32,
}

struct Echo {
    manner: Manner,
    seen: Arc<Seen>,
    config: [u8; 8],
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    exit: (EventConsumer, EventNotifier),
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.manner.queues
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        self.manner.features
    }

    fn acked_features(&mut self, features: u64) {
        self.seen.features.lock().unwrap().push(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.manner.protocol
    }

    fn reset_device(&mut self) {
        self.seen.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config[offset as usize..][..size as usize].to_vec()
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        // Only the first half is the driver's to write.
        if offset < 4 {
            self.config[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        if let Some(hang) = &self.manner.hangs {
            hang.wait();
        }
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().unwrap(), self.exit.1.try_clone().unwrap()))
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.as_ref().unwrap().memory();
        let vring = &vrings[usize::from(queue)];
        let chains: Vec<_> =
            vring.get_mut().get_queue_mut().iter(memory.clone()).unwrap().collect();
        for chain in chains {
            let head = chain.head_index();
            let parts: Vec<_> = chain.collect();
            let mut text = vec![0; parts[0].len() as usize];
            memory.read_slice(&mut text, parts[0].addr()).unwrap();
            text.make_ascii_uppercase();
            memory.write_slice(&text, parts[1].addr()).unwrap();
            vring.add_used(head, parts[0].len()).unwrap();
        }
        vring.signal_used_queue().unwrap();
        Ok(())
    }
}

/// A daemon with one connection, and what it saw.
pub(crate) struct Backend {
    pub(crate) socket: UnixStream,
    pub(crate) seen: Arc<Seen>,
    daemon: JoinHandle<()>,
}

impl Backend {
    /// Starts a daemon; its threads end with the connection.
    pub(crate) fn start(manner: Manner) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nacre-echo-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let mut listener = Listener::from(UnixListener::bind_addr(&address).unwrap());
        let seen = Arc::<Seen>::default();
        let config = manner.config;
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
        let echo = Echo { manner, seen: Arc::clone(&seen), config, memory: None, exit };
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let echo = Arc::new(Mutex::new(echo));
        let mut daemon = VhostUserDaemon::new("echo".to_owned(), echo, memory).unwrap();
        let socket = UnixStream::connect_addr(&address).unwrap();
        daemon.start(&mut listener).unwrap();
        let daemon = std::thread::spawn(move || drop(daemon.wait()));
        Self { socket, seen, daemon }
    }

    /// Hangs up and is gone, as a process that is killed.
    pub(crate) fn end(self) {
        self.socket.shutdown(Shutdown::Both).unwrap();
        self.daemon.join().unwrap();
    }
}
