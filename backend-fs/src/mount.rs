//! The guest's mount in a new process: virtiofsd learns what was negotiated from INIT alone, and the
//! guest sends that once. So it is sent again here, from memory of our own.

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::request::INIT;
use crate::table::Session;

const MEMORY_BYTES: usize = 0x3000;
const AVAIL: u64 = 0x100;
const REQUEST: u64 = 0x1000;
const ANSWER: u64 = 0x2000;
const ANSWER_BYTES: u32 = 0x1000;
/// `struct fuse_in_header`.
const HEADER_BYTES: usize = 40;

/// Flags of a descriptor (virtio 1.3, section 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Why the mount can't be taken up again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    #[error("no memory for it")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("virtiofsd does not take it")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("virtiofsd answers with error {0}")]
    Refused(i32),
}

fn memory(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> MountError {
    MountError::Memory(error.into())
}

/// Mounts again as the guest did.
pub(crate) fn again<F: FileSystem + Sync>(
    server: &Server<F>,
    session: &Session,
) -> Result<(), MountError> {
    const NO_FRONTEND: Option<&mut ()> = None;
    let range = (GuestAddress(0), MEMORY_BYTES);
    let own = GuestMemoryMmap::<BitmapMmapRegion>::from_ranges(&[range]).map_err(memory)?;
    write(&own, session).map_err(memory)?;
    let mut queue = Queue::new(2).map_err(memory)?;
    queue.try_set_desc_table_address(GuestAddress(0)).map_err(memory)?;
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).map_err(memory)?;
    queue.set_ready(true);
    let chain = queue.iter(&own).map_err(memory)?.next();
    let chain = chain.ok_or_else(|| memory("the ring is empty"))?;
    let reader = Reader::new(&own, chain.clone()).map_err(memory)?;
    let writer = Writer::new(&own, chain).map_err(memory)?;
    let handled = server.handle_message(reader, writer, NO_FRONTEND);
    handled.map_err(|error| MountError::Server(error.into()))?;
    let error: i32 = own.read_obj(GuestAddress(ANSWER + 4)).map_err(memory)?;
    if error == 0 { Ok(()) } else { Err(MountError::Refused(-error)) }
}

/// The request, and a ring with it alone (virtio 1.3, sections 2.7.5 and 2.7.6).
fn write(
    own: &GuestMemoryMmap<BitmapMmapRegion>,
    session: &Session,
) -> Result<(), vm_memory::GuestMemoryError> {
    let arguments = session.arguments();
    let len = u32::try_from(HEADER_BYTES + arguments.len()).unwrap_or(0);
    let mut request = [0; HEADER_BYTES];
    request[..4].copy_from_slice(&len.to_le_bytes());
    request[4..8].copy_from_slice(&INIT.to_le_bytes());
    own.write_slice(&request, GuestAddress(REQUEST))?;
    own.write_slice(arguments, GuestAddress(REQUEST + HEADER_BYTES as u64))?;
    for (at, address, len, flags, next) in
        [(0, REQUEST, len, NEXT, 1_u16), (16, ANSWER, ANSWER_BYTES, WRITE, 0)]
    {
        own.write_obj(address.to_le(), GuestAddress(at))?;
        own.write_obj(len.to_le(), GuestAddress(at + 8))?;
        own.write_obj(flags.to_le(), GuestAddress(at + 12))?;
        own.write_obj(next.to_le(), GuestAddress(at + 14))?;
    }
    // Flags, index, and the one entry.
    own.write_obj(1_u16.to_le(), GuestAddress(AVAIL + 2))?;
    own.write_obj(0_u16, GuestAddress(AVAIL + 4))
}
