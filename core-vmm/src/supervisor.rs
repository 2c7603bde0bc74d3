//! The supervisor's socket: datagrams from it, with the descriptors beside them, and to it.
//!
//! A descriptor that comes is closed on exec, and closed at once unless somebody takes it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nacre_proto::vmm::{self, Told};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

use crate::error_chain;

/// Room for more descriptors than any request has, so that too many are seen as such.
const ROOM: usize = 4;

/// The control socket's end in this process.
#[derive(Debug)]
pub struct Supervisor {
    socket: OwnedFd,
}

/// What came.
#[derive(Debug)]
pub enum Heard {
    /// Nothing yet.
    Nothing,
    /// The other end is closed.
    Gone,
    /// A datagram.
    Datagram(Datagram),
}

/// A datagram and what came beside it.
#[derive(Debug)]
pub struct Datagram {
    /// The bytes; cut off behind the longest message there is.
    pub bytes: Vec<u8>,
    /// How long it was.
    pub len_bytes: usize,
    /// The descriptors.
    pub descriptors: Descriptors,
}

/// Descriptors that came beside a datagram.
#[derive(Debug)]
pub struct Descriptors {
    all: Vec<OwnedFd>,
    /// There were more, which the kernel closed.
    cut: bool,
}

impl Descriptors {
    /// How many came; those for which there was no room count as one.
    #[must_use]
    pub fn count(&self) -> usize {
        self.all.len() + usize::from(self.cut)
    }

    /// All of them, so many.
    ///
    /// # Panics
    ///
    /// Panics if there are fewer or more; [`Descriptors::count`] is looked at before.
    #[must_use]
    pub fn exactly<const N: usize>(self) -> [OwnedFd; N] {
        assert!(!self.cut, "more descriptors than there is room for");
        self.all.try_into().expect("the count of descriptors was checked")
    }

    /// The descriptor, if it is the only one.
    #[must_use]
    pub fn single(self) -> Option<OwnedFd> {
        let [one] = <[OwnedFd; 1]>::try_from(self.all).ok().filter(|_one| !self.cut)?;
        Some(one)
    }
}

impl Supervisor {
    /// Speaks with the supervisor on `socket`.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// What the supervisor has sent, without waiting for it.
    ///
    /// # Errors
    ///
    /// Fails if the socket does.
    pub fn hear(&self) -> io::Result<Heard> {
        let mut bytes = vec![0; vmm::MAX_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ROOM))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        // TRUNC gives the datagram's real length, so that one too long is seen as such.
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
        let received =
            match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut beside, flags) {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(Heard::Nothing),
                Err(error) => return Err(error.into()),
            };
        let rights = beside.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let all = rights.flatten().collect();
        if received.bytes == 0 {
            return Ok(Heard::Gone);
        }
        let cut = received.flags.contains(ReturnFlags::CTRUNC);
        bytes.truncate(received.bytes);
        let descriptors = Descriptors { all, cut };
        Ok(Heard::Datagram(Datagram { bytes, len_bytes: received.bytes, descriptors }))
    }

    /// Tells the supervisor something. One that does not listen misses it.
    pub fn tell(&self, told: &Told) {
        let sent = vmm::encode(told).map_err(io::Error::other).and_then(|bytes| {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            Ok(send(&self.socket, &bytes, flags)?)
        });
        if let Err(error) = sent {
            log::warn!("the supervisor does not listen: {}", error_chain(&error));
        }
    }
}

impl AsRawFd for Supervisor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, SocketType, sendmsg,
        socketpair,
    };

    use super::*;

    fn pair() -> (Supervisor, OwnedFd) {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        (Supervisor::new(ours), theirs)
    }

    fn send_with(socket: &OwnedFd, bytes: &[u8], descriptors: usize) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let all = vec![socket.as_fd(); descriptors];
        assert!(all.is_empty() || beside.push(SendAncillaryMessage::ScmRights(&all)));
        sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::empty()).unwrap();
    }

    fn datagram(supervisor: &Supervisor) -> Datagram {
        match supervisor.hear().unwrap() {
            Heard::Datagram(datagram) => datagram,
            other => panic!("heard {other:?}"),
        }
    }

    #[test]
    fn descriptors_are_counted_and_one_alone_can_be_taken() {
        let (supervisor, theirs) = pair();
        for count in [0, 2, ROOM] {
            send_with(&theirs, b"x", count);
            let heard = datagram(&supervisor);
            assert_eq!((heard.bytes.as_slice(), heard.descriptors.count()), (&b"x"[..], count));
            assert!(heard.descriptors.single().is_none());
        }
        send_with(&theirs, b"x", 16);
        let heard = datagram(&supervisor);
        assert!((ROOM + 1..16).contains(&heard.descriptors.count()));
        assert!(heard.descriptors.single().is_none());
        send_with(&theirs, b"x", 1);
        let taken = datagram(&supervisor).descriptors.single().unwrap();
        assert_eq!(fcntl_getfd(&taken).unwrap(), FdFlags::CLOEXEC);
    }

    #[test]
    fn silence_a_long_datagram_and_the_end_are_told_apart() {
        let (supervisor, theirs) = pair();
        assert!(matches!(supervisor.hear().unwrap(), Heard::Nothing));
        send_with(&theirs, &vec![1; vmm::MAX_BYTES + 7], 0);
        let heard = datagram(&supervisor);
        assert_eq!((heard.bytes.len(), heard.len_bytes), (vmm::MAX_BYTES, vmm::MAX_BYTES + 7));
        drop(theirs);
        assert!(matches!(supervisor.hear().unwrap(), Heard::Gone));
    }
}
