//! The one message that the `vhost` crate refuses and a frontend may rightly send: a ring's
//! enabling before `SET_FEATURES`.
//!
//! QEMU enables a nic's rings when the guest's driver is not there yet. `PROTOCOL_FEATURES`, the
//! condition for the message, is then agreed by the protocol's own messages; the crate waits for
//! the virtio feature bits. So each message is looked at before the crate reads it, and where the
//! crate refuses this one it is carried out and answered here.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};

/// Header (request, flags, size: u32 each) and body (ring, state: u32 each), in bytes.
const MESSAGE_BYTES: usize = 20;
/// `VHOST_USER_SET_VRING_ENABLE`.
const SET_VRING_ENABLE: u32 = 18;
/// Version 1 of the protocol, in the flags.
const VERSION: u32 = 1;
/// The message is a reply.
const REPLY: u32 = 1 << 2;
/// The frontend wants one.
const NEED_REPLY: u32 = 1 << 3;

/// A ring's enabling or disabling, as it stands in the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingState {
    /// Which ring.
    pub(crate) index: u32,
    /// Whether it shall run.
    pub(crate) enable: bool,
    wants_reply: bool,
}

/// Waits for the next message and looks at it without taking it, if it is a ring's enabling.
///
/// # Errors
///
/// Fails if the socket does; a frontend that hung up is no error, the next read tells.
pub(crate) fn peek(socket: &UnixStream) -> io::Result<Option<RingState>> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut vectors = [IoSliceMut::new(&mut bytes)];
    let mut control = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut vectors, &mut control, flags)?;
    Ok((received.bytes == MESSAGE_BYTES).then(|| RingState::read(&bytes)).flatten())
}

impl RingState {
    fn read(bytes: &[u8; MESSAGE_BYTES]) -> Option<Self> {
        let (words, _) = bytes.as_chunks();
        let [request, flags, _size, index, state] = *words else { return None };
        let state = u32::from_le_bytes(state);
        (u32::from_le_bytes(request) == SET_VRING_ENABLE && state <= 1).then(|| Self {
            index: u32::from_le_bytes(index),
            enable: state == 1,
            wants_reply: u32::from_le_bytes(flags) & NEED_REPLY != 0,
        })
    }

    /// Says that it was carried out, if the frontend wants to know.
    ///
    /// # Errors
    ///
    /// Fails if the socket does.
    pub(crate) fn answer(self, socket: &UnixStream) -> io::Result<()> {
        if !self.wants_reply {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(MESSAGE_BYTES);
        for word in [SET_VRING_ENABLE, VERSION | REPLY, 8, 0, 0] {
            bytes.extend(word.to_le_bytes());
        }
        let mut control = SendAncillaryBuffer::default();
        sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn message(request: u32, flags: u32, body: [u32; 2]) -> Vec<u8> {
        [request, flags, 8, body[0], body[1]].map(u32::to_le_bytes).as_flattened().to_vec()
    }

    #[test]
    fn a_rings_enabling_is_seen_and_left_where_it_is() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let sent = message(SET_VRING_ENABLE, VERSION | NEED_REPLY, [3, 1]);
        ours.write_all(&sent).unwrap();
        let state = peek(&theirs).unwrap().unwrap();
        assert_eq!((state.index, state.enable), (3, true));
        let mut read = vec![0; sent.len()];
        (&theirs).read_exact(&mut read).unwrap();
        assert_eq!(read, sent);
        state.answer(&theirs).unwrap();
        let mut reply = vec![0; MESSAGE_BYTES];
        ours.read_exact(&mut reply).unwrap();
        assert_eq!(reply, message(SET_VRING_ENABLE, VERSION | REPLY, [0, 0]));
    }

    #[test]
    fn other_messages_are_nothing_special() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&message(1, VERSION, [0, 0])).unwrap();
        assert_eq!(peek(&theirs).unwrap(), None);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert_eq!(peek(&theirs).unwrap(), None);
    }
}
