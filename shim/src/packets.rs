//! `SOCK_SEQPACKET` sockets for the runtime: whole datagrams, with descriptors beside them.
//!
//! What the datagrams mean is not known here. An empty datagram can't be told from the end of the
//! connection and is taken for it: no protocol here has one.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// How many descriptors are sent beside a datagram: as many as the one that needs most, a VFIO
/// device's container, group and device.
const MOST_SENT: usize = 3;
/// How many descriptors beside a datagram are taken: one more than any message has, so that too
/// many are seen.
const MOST_BESIDE: usize = MOST_SENT + 1;

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Packets {
    socket: AsyncFd<OwnedFd>,
}

/// A datagram that came.
#[derive(Debug)]
pub(crate) struct Received {
    /// Its length; none if the other end has hung up.
    pub(crate) len_bytes: usize,
    /// What was beside it.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether some of it, or some descriptors, found no room.
    pub(crate) is_cut: bool,
}

impl Packets {
    /// A connection to a process that is yet to be started: ours, and its end.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self::new(ours)?, theirs))
    }

    /// A connection, or a listening socket.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket: sys::watch_socket(socket)? })
    }

    /// Sends a datagram with at most [`MOST_SENT`] descriptors beside it. It waits while there is no
    /// room.
    pub(crate) async fn send(&self, bytes: &[u8], beside: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            let mut guard = self.socket.writable().await?;
            // An error means that there was no room after all.
            if let Ok(sent) = guard.try_io(|socket| send(socket.as_fd(), bytes, beside)) {
                return sent;
            }
        }
    }

    /// Waits for a datagram.
    pub(crate) async fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        loop {
            let mut guard = self.socket.readable().await?;
            if let Ok(received) = guard.try_io(|socket| receive(socket.as_fd(), buffer)) {
                return received;
            }
        }
    }

    /// A datagram that is there already, if one is.
    pub(crate) fn receive_now(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        match receive(self.socket.as_fd(), buffer) {
            Ok(received) => Ok(Some(received)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for somebody to connect to this listening socket.
    pub(crate) async fn accept(&self) -> io::Result<Self> {
        loop {
            let mut guard = self.socket.readable().await?;
            let accepted =
                guard.try_io(|socket| Ok(rustix::net::accept_with(socket, SocketFlags::CLOEXEC)?));
            if let Ok(accepted) = accepted {
                return Self::new(accepted?);
            }
        }
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], beside: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if beside.len() > MOST_SENT
        || (!beside.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(beside)))
    {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_BESIDE))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let received = recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    Ok(Received {
        len_bytes: received.bytes,
        fds: fds.collect(),
        is_cut: received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_and_descriptors_arrive_as_they_were_sent_and_then_the_end() {
        let (ours, theirs) = Packets::pair().unwrap();
        let theirs = Packets::new(theirs).unwrap();
        assert!(ours.receive_now(&mut [0; 8]).unwrap().is_none());
        let fd = theirs.as_fd();
        theirs.send(b"one", &[fd, fd, fd]).await.unwrap();
        assert!(theirs.send(b"two", &[fd, fd, fd, fd]).await.is_err());
        theirs.send(b"three four", &[]).await.unwrap();
        drop(theirs);
        let mut buffer = [0; 8];
        let first = ours.receive(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..first.len_bytes], first.fds.len()), (&b"one"[..], 3));
        drop(first);
        assert!(ours.receive(&mut buffer).await.unwrap().is_cut);
        assert_eq!(ours.receive(&mut buffer).await.unwrap().len_bytes, 0);
    }
}
