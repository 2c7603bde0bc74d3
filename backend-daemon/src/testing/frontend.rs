//! The frontend's side of one vhost-user connection.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write, pipe};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight,
};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap};

use super::memory::{GuestMemory, Region};
use super::queue::GuestQueue;
use super::{DEADLINE, Enabling, Options};

/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;

/// What became of a conversation; it fails if the daemon refuses, or is gone.
pub(super) type Told<T> = Result<T, Box<dyn Error>>;

pub(super) struct Connection {
    frontend: Frontend,
    stream: UnixStream,
    pub(super) features: u64,
    enabling: Enabling,
    /// Where the backend sends messages of its own.
    requests: Option<UnixStream>,
    /// Written pages are logged.
    logs: bool,
}

/// The region in which a backend marks its requests in flight, as the frontend keeps it.
pub(super) struct Inflight {
    info: VhostUserInflight,
    file: File,
}

impl Inflight {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.info.mmap_size).unwrap()];
        self.file.read_exact_at(&mut bytes, self.info.mmap_offset).unwrap();
        bytes
    }

    /// Sets the first byte of an entry of a queue's part.
    pub(super) fn mark(&self, queue: u16, head: u16) {
        let part = self.info.mmap_size / u64::from(self.info.num_queues);
        let entry = u64::from(queue) * part + 16 + 16 * u64::from(head);
        self.file.write_all_at(&[1], self.info.mmap_offset + entry).unwrap();
    }
}

impl Connection {
    /// Negotiates. Every message asks for an acknowledgement, so that a refusal is noticed where
    /// it happens.
    pub(super) fn new(stream: UnixStream, options: &Options) -> Told<Self> {
        let own = stream.try_clone()?;
        let mut frontend = Frontend::from_stream(stream, options.queues.into());
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let mut wanted = options.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        for (bit, wish) in [
            (VIRTIO_RING_F_EVENT_IDX, options.event_idx),
            (VIRTIO_RING_F_INDIRECT_DESC, options.indirect),
        ] {
            wanted = if wish { wanted | 1 << bit } else { wanted & !(1 << bit) };
        }
        let features = offered & wanted & !LOG_ALL;
        let protocol = frontend.get_protocol_features()?;
        let known = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::STATUS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::DEVICE_STATE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let inflight = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let known = if options.inflight { known | inflight } else { known };
        assert!(!options.inflight || protocol.contains(inflight), "no inflight tracking");
        frontend.set_protocol_features(protocol & known)?;
        if let Enabling::First { answered } = options.enabling {
            for queue in 0..options.queues {
                enable_early(&own, queue, answered)?;
            }
        }
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features)?;
        let mut requests = None;
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            frontend.set_backend_request_fd(&theirs)?;
            requests = Some(ours);
        }
        let queues = frontend.get_queue_num()?;
        assert!(queues >= options.queues.into(), "the device has only {queues} queues");
        Ok(Self {
            frontend,
            stream: own,
            features,
            enabling: options.enabling,
            requests,
            logs: false,
        })
    }

    pub(super) fn has_event_idx(&self) -> bool {
        self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }

    pub(super) fn has_indirect(&self) -> bool {
        self.features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0
    }

    pub(super) fn set_memory(&mut self, memory: &GuestMemory) -> Told<()> {
        let regions: Vec<_> = memory.map().iter().map(|region| describe(memory, region)).collect();
        self.frontend.set_mem_table(&regions)?;
        Ok(())
    }

    pub(super) fn get_inflight(&mut self, size: u16, queues: u16) -> Told<Inflight> {
        let asked = VhostUserInflight::new(0, 0, queues, size);
        let (info, file) = self.frontend.get_inflight_fd(&asked)?;
        Ok(Inflight { info, file })
    }

    pub(super) fn set_inflight(&mut self, region: &Inflight) -> Told<()> {
        self.frontend.set_inflight_fd(&region.info, region.file.as_raw_fd())?;
        Ok(())
    }

    pub(super) fn add_region(&mut self, memory: &GuestMemory, region: Region) {
        self.frontend.add_mem_region(&describe(memory, memory.region(region))).unwrap();
    }

    pub(super) fn remove_region(&mut self, memory: &GuestMemory, region: Region) {
        self.frontend.remove_mem_region(&describe(memory, memory.region(region))).unwrap();
    }

    pub(super) fn start_queue(
        &mut self,
        queue: &GuestQueue,
        memory: &GuestMemory,
        base: u16,
    ) -> Told<()> {
        let index = usize::from(queue.index);
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.size)?;
        frontend.set_vring_base(index, base)?;
        self.set_addresses(queue, memory)?;
        let frontend = &mut self.frontend;
        frontend.set_vring_call(index, &queue.call)?;
        frontend.set_vring_err(index, &queue.err)?;
        frontend.set_vring_kick(index, &queue.kick)?;
        if self.enabling == Enabling::Last {
            frontend.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Says where a running queue lies, and whether its used ring is logged.
    fn set_addresses(&mut self, queue: &GuestQueue, memory: &GuestMemory) -> Told<()> {
        let index = usize::from(queue.index);
        let addresses = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: u32::from(self.logs),
            desc_table_addr: memory.user_address(queue.descriptors()),
            used_ring_addr: memory.user_address(queue.used()),
            avail_ring_addr: memory.user_address(queue.avail()),
            log_addr: self.logs.then(|| queue.used()),
        };
        Ok(self.frontend.set_vring_addr(index, &addresses)?)
    }

    /// Has written pages logged in `file`, as a frontend that begins to move the guest.
    pub(super) fn log_dirty(
        &mut self,
        file: &File,
        queues: &[GuestQueue],
        memory: &GuestMemory,
    ) -> Told<()> {
        let mmap_size = file.metadata()?.len();
        let region =
            VhostUserDirtyLogRegion { mmap_size, mmap_offset: 0, mmap_handle: file.as_raw_fd() };
        self.frontend.set_log_base(0, Some(region))?;
        self.logs = true;
        self.frontend.set_features(self.features | LOG_ALL)?;
        queues.iter().try_for_each(|queue| self.set_addresses(queue, memory))
    }

    /// Ends that.
    pub(super) fn stop_log(&mut self) -> Told<()> {
        self.logs = false;
        Ok(self.frontend.set_features(self.features)?)
    }

    pub(super) fn stop_queue(&mut self, queue: u16) -> u16 {
        let base = self.frontend.get_vring_base(queue.into()).unwrap();
        u16::try_from(base).unwrap()
    }

    pub(super) fn enable_queue(&mut self, queue: u16, enable: bool) {
        self.frontend.set_vring_enable(queue.into(), enable).unwrap();
    }

    pub(super) fn reset_device(&mut self) {
        self.frontend.reset_device().unwrap();
    }

    pub(super) fn config(&mut self, offset: u32, len_bytes: u32) -> Vec<u8> {
        let buffer = vec![0; len_bytes as usize];
        let flags = VhostUserConfigFlags::empty();
        let (_header, bytes) = self.frontend.get_config(offset, len_bytes, flags, &buffer).unwrap();
        bytes
    }

    pub(super) fn write_config(&mut self, offset: u32, bytes: &[u8]) -> bool {
        self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes).is_ok()
    }

    /// Waits until the backend says that the configuration is another one.
    pub(super) fn hear_of_configuration(&mut self) {
        let requests = self.requests.as_mut().expect("the device has a configuration");
        requests.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut message = [0; 12];
        requests.read_exact(&mut message).unwrap();
        let expected = [2_u32, 1, 0].map(u32::to_le_bytes);
        assert_eq!(message, expected.as_flattened());
    }

    /// `SET_STATUS`, acknowledged.
    pub(super) fn set_status(&mut self, status: u64) -> Told<()> {
        let message = [39_u32, 1 | 1 << 3, 8].map(u32::to_le_bytes);
        self.stream.write_all(&[message.as_flattened(), &status.to_le_bytes()].concat())?;
        if self.number(39)? == 0 { Ok(()) } else { Err("it was refused".into()) }
    }

    /// `GET_STATUS`.
    pub(super) fn status(&mut self) -> Told<u64> {
        self.stream.write_all([40_u32, 1, 0].map(u32::to_le_bytes).as_flattened())?;
        self.number(40)
    }

    /// The reply to a message: a number.
    fn number(&mut self, request: u32) -> Told<u64> {
        let mut reply = [0; 20];
        self.stream.read_exact(&mut reply)?;
        let header = [request, 1 | 1 << 2, 8].map(u32::to_le_bytes);
        assert_eq!(reply[..12], *header.as_flattened());
        Ok(u64::from_le_bytes(reply[12..].try_into()?))
    }

    pub(super) fn save_state(&mut self) -> Told<Vec<u8>> {
        let (mut ours, theirs) = pipe()?;
        let (save, stopped) = (VhostTransferStateDirection::SAVE, VhostTransferStatePhase::STOPPED);
        self.frontend.set_device_state_fd(save, stopped, theirs.into())?;
        let mut state = Vec::new();
        ours.read_to_end(&mut state)?;
        self.frontend.check_device_state()?;
        Ok(state)
    }

    pub(super) fn load_state(&mut self, state: &[u8]) -> Told<()> {
        let (theirs, mut ours) = pipe()?;
        let (load, stopped) = (VhostTransferStateDirection::LOAD, VhostTransferStatePhase::STOPPED);
        self.frontend.set_device_state_fd(load, stopped, theirs.into())?;
        ours.write_all(state)?;
        drop(ours);
        Ok(self.frontend.check_device_state()?)
    }

    pub(super) fn send_garbage(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Ends the connection; the daemon may have done so before.
    pub(super) fn hang_up(&mut self) {
        match self.stream.shutdown(Shutdown::Both) {
            Ok(()) | Err(_) => {}
        }
    }
}

/// Sends what the `vhost` crate's frontend would not send yet.
fn enable_early(mut stream: &UnixStream, queue: u16, answered: bool) -> Told<()> {
    const SET_VRING_ENABLE: u32 = 18;
    let flags = if answered { 1 | 1 << 3 } else { 1 };
    let message = [SET_VRING_ENABLE, flags, 8, queue.into(), 1].map(u32::to_le_bytes);
    stream.write_all(message.as_flattened())?;
    if answered {
        let mut reply = [0; 20];
        stream.read_exact(&mut reply)?;
        let good = [SET_VRING_ENABLE, 1 | 1 << 2, 8, 0, 0].map(u32::to_le_bytes);
        assert_eq!(reply, good.as_flattened());
    }
    Ok(())
}

fn describe(memory: &GuestMemory, region: &GuestRegionMmap<()>) -> VhostUserMemoryRegionInfo {
    let GuestAddress(start) = region.start_addr();
    let file = region.file_offset().expect("all of the guest's memory is in files");
    VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: region.len(),
        userspace_addr: memory.user_address(start),
        mmap_offset: file.start(),
        mmap_handle: file.file().as_raw_fd(),
    }
}
