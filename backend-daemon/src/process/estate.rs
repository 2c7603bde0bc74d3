//! What outlives a process: a piece of memory and descriptors that the supervisor keeps for it.
//!
//! A device reads its [`Estate`] while it is built, with everything that its predecessor left, and
//! from then on writes there whatever its own successor must know. A process that is killed writes
//! nothing any more: the memory has to be whole after each single store.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{mem::MaybeUninit, sync::Arc};

use nacre_proto::store::{self, FromStore, Malformed, ToStore};
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::DaemonArgs;
use crate::sys;

/// How many descriptors a supervisor may hand in: more than a device could have put there.
const MOST_HELD: usize = 1 << 16;

/// Why there is no estate, though one was promised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EstateError {
    /// `--state-fd` is no memory file that keeps its size.
    #[error("--state-fd is no memory file that is sealed against shrinking")]
    NotSealed,
    /// The state can't be mapped.
    #[error("cannot map --state-fd")]
    Map(#[source] MmapRegionError),
    /// A descriptor of the command line is none.
    #[error("{what}")]
    Descriptor {
        /// Which.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The supervisor did not hand in what the store holds.
    #[error("cannot take over what --store-fd holds")]
    Receive(#[source] io::Error),
    /// The supervisor said something else.
    #[error("--store-fd does not speak the store's protocol")]
    Malformed,
}

impl From<Malformed> for EstateError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// What the process inherits, and where it leaves things to its successor.
#[derive(Debug)]
pub struct Estate {
    /// Memory; all zero for the first process of a device.
    pub state: State,
    /// Where to leave descriptors.
    pub store: Store,
    /// What predecessors left there, by key.
    pub held: Vec<(u64, OwnedFd)>,
}

/// A piece of memory of fixed size that outlives the process. It is shared with the supervisor,
/// which keeps it and never looks into it.
#[derive(Clone, Debug)]
pub struct State {
    mapping: Arc<MmapRegion<()>>,
}

impl State {
    /// Maps a memory file whole.
    ///
    /// # Errors
    ///
    /// Fails if it is none or can still shrink under the mapping.
    pub fn map(file: File) -> Result<Self, EstateError> {
        let seals = fcntl_get_seals(&file).map_err(|_error| EstateError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(EstateError::NotSealed);
        }
        let metadata = file.metadata().map_err(|source| EstateError::Descriptor {
            what: "cannot examine --state-fd",
            source,
        })?;
        let len_bytes = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        let mapping =
            MmapRegion::from_file(FileOffset::new(file, 0), len_bytes).map_err(EstateError::Map)?;
        Ok(Self { mapping: Arc::new(mapping) })
    }

    /// All of it, page-aligned.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        self.mapping.as_volatile_slice()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Whether there is nothing of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mapping.len() == 0
    }
}

/// Where a process leaves descriptors to its successor. Any thread may use it that may `sendmsg`
/// and `sendto`.
#[derive(Clone, Debug)]
pub struct Store {
    socket: Arc<OwnedFd>,
}

impl Store {
    /// Leaves a copy of `fd` under `key`, in place of what is there.
    ///
    /// It never waits: a supervisor that does not take messages in makes it fail.
    ///
    /// # Errors
    ///
    /// Fails if the supervisor is gone or too slow; nothing was left then.
    pub fn put(&self, key: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        let datagram = ToStore::Put { key }.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        if !beside.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.socket, &[io::IoSlice::new(&datagram)], &mut beside, flags)?;
        Ok(())
    }

    /// Has the supervisor close what is under `key`.
    ///
    /// # Errors
    ///
    /// Fails if the supervisor is gone or too slow.
    pub fn remove(&self, key: u64) -> io::Result<()> {
        let datagram = ToStore::Remove { key }.encode();
        send(&self.socket, &datagram, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// A store on this socket, and what it holds. It waits for the supervisor.
    ///
    /// # Errors
    ///
    /// Fails if the supervisor hangs up or says something else.
    pub fn open(socket: OwnedFd) -> Result<(Self, Vec<(u64, OwnedFd)>), EstateError> {
        let mut held = Vec::new();
        while let Some(entry) = take_over(&socket)? {
            held.push(entry);
            if held.len() > MOST_HELD {
                return Err(EstateError::Malformed);
            }
        }
        Ok((Self { socket: Arc::new(socket) }, held))
    }
}

fn take_over(socket: &OwnedFd) -> Result<Option<(u64, OwnedFd)>, EstateError> {
    let receive = |error: rustix::io::Errno| EstateError::Receive(error.into());
    let mut datagram = [0; store::BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(&mut datagram)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| recvmsg(socket, &mut parts, &mut beside, flags))
        .map_err(receive)?;
    let mut fds = beside.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let (first, more) = (fds.next(), fds.next());
    match (FromStore::decode(&datagram[..received.bytes])?, first, more) {
        (FromStore::Held { key }, Some(fd), None) => Ok(Some((key, fd))),
        (FromStore::End, None, None) => Ok(None),
        _ => Err(EstateError::Malformed),
    }
}

impl DaemonArgs {
    /// What the supervisor keeps for this device, if it keeps anything: `--state-fd` and
    /// `--store-fd`, which come together. To be called once, while the device is built.
    ///
    /// # Errors
    ///
    /// Fails if what the command line names is not what it should be.
    pub fn estate(&self) -> Result<Option<Estate>, EstateError> {
        let (Some(state), Some(store)) = (self.state_fd, self.store_fd) else { return Ok(None) };
        let inherited = |number, what| {
            sys::inherited_fd(number).map_err(|source| EstateError::Descriptor { what, source })
        };
        let state = State::map(inherited(state, "--state-fd is no descriptor")?.into())?;
        let (store, held) = Store::open(inherited(store, "--store-fd is no descriptor")?)?;
        Ok(Some(Estate { state, store, held }))
    }
}

impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn memory(name: &str) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create(name, flags).unwrap());
        file.set_len(8192).unwrap();
        file
    }

    #[test]
    fn what_one_process_puts_the_next_one_is_given() {
        let (ours, theirs) = pair();
        send(&ours, &FromStore::End.encode(), SendFlags::empty()).unwrap();
        let (store, held) = Store::open(theirs).unwrap();
        assert!(held.is_empty());
        let file = memory("kept");
        store.put(7, file.as_fd()).unwrap();
        let mut datagram = [0; store::BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [io::IoSliceMut::new(&mut datagram)];
        recvmsg(&ours, &mut parts, &mut beside, RecvFlags::empty()).unwrap();
        assert_eq!(ToStore::decode(&datagram).unwrap(), ToStore::Put { key: 7 });
        assert!(matches!(beside.drain().next(), Some(RecvAncillaryMessage::ScmRights(_))));
    }

    #[test]
    fn a_store_that_says_something_else_is_refused() {
        for datagram in [&b"hello, it's"[..], &FromStore::Held { key: 1 }.encode(), b""] {
            let (ours, theirs) = pair();
            send(&ours, datagram, SendFlags::empty()).unwrap();
            assert!(matches!(Store::open(theirs), Err(EstateError::Malformed)), "{datagram:?}");
        }
        let (ours, theirs) = pair();
        drop(ours);
        assert!(matches!(Store::open(theirs), Err(EstateError::Malformed)));
    }

    #[test]
    fn state_has_to_be_sealed() {
        let file = memory("state");
        assert!(matches!(State::map(file.try_clone().unwrap()), Err(EstateError::NotSealed)));
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
        assert_eq!(State::map(file).unwrap().len(), 8192);
        assert!(matches!(State::map(tempfile::tempfile().unwrap()), Err(EstateError::NotSealed)));
    }
}
