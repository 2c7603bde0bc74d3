//! The messages that are handled beside the `vhost` crate.
//!
//! A ring's enabling before `SET_FEATURES`: QEMU enables a nic's rings when the guest's driver is
//! not there yet. `PROTOCOL_FEATURES`, the condition for the message, is then agreed by the
//! protocol's own messages; the crate waits for the virtio feature bits. `SET_STATUS` and
//! `GET_STATUS`, for which the crate has no code. `SET_BACKEND_REQ_FD`, because the crate's end of
//! that channel can't tell of a new configuration.
//!
//! So each message is looked at before the crate reads it, and these are taken from the socket and
//! answered here.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg,
    sendmsg,
};

/// Request, flags and size of the body, in bytes.
const HEADER_BYTES: usize = 12;
/// The header and the longest body of these messages.
const MESSAGE_BYTES: usize = HEADER_BYTES + 8;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;
/// Of the backend to the frontend: the configuration is another one.
const CONFIG_CHANGE: u32 = 2;
/// Version 1 of the protocol, in the flags.
const VERSION: u32 = 1;
/// The message is a reply.
const REPLY: u32 = 1 << 2;
/// The frontend wants one.
const NEED_REPLY: u32 = 1 << 3;

/// One of these messages, as it stands in the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) what: What,
    request: u32,
    wants_reply: bool,
    body_bytes: usize,
}

/// What it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A ring shall run, or not.
    Enable { index: u32, enable: bool },
    /// There is a channel for messages to the frontend.
    Channel,
    /// The driver's view of the device (virtio 1.3, section 2.1).
    SetStatus(u64),
    /// As it was set.
    GetStatus,
}

/// Waits for the next message and looks at it without taking it, if it is one of these.
///
/// # Errors
///
/// Fails if the socket does; a frontend that hung up is no error, the next read tells.
pub(crate) fn peek(socket: &UnixStream) -> io::Result<Option<Message>> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut vectors = [IoSliceMut::new(&mut bytes)];
    let mut control = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut vectors, &mut control, flags)?;
    Ok(Message::read(&bytes, received.bytes))
}

impl Message {
    /// The message at the start of `bytes`, of which `len` have come.
    fn read(bytes: &[u8; MESSAGE_BYTES], len: usize) -> Option<Self> {
        let (words, _) = bytes.as_chunks();
        let [request, flags, size, first, second] = *words else { return None };
        let [request, flags, size, first, second] =
            [request, flags, size, first, second].map(u32::from_le_bytes);
        let body_bytes = size as usize;
        let what = match (request, body_bytes) {
            (SET_VRING_ENABLE, 8) if second <= 1 => {
                What::Enable { index: first, enable: second == 1 }
            }
            (SET_BACKEND_REQ_FD, 0) => What::Channel,
            (SET_STATUS, 8) => What::SetStatus(u64::from(first) | u64::from(second) << 32),
            (GET_STATUS, 0) => What::GetStatus,
            _ => return None,
        };
        let is_whole = len >= HEADER_BYTES + body_bytes && flags & 3 == VERSION;
        let wants_reply = flags & NEED_REPLY != 0;
        is_whole.then_some(Self { what, request, wants_reply, body_bytes })
    }

    /// Takes the message from the socket, with the descriptor beside it.
    ///
    /// # Errors
    ///
    /// Fails if the socket does.
    pub(crate) fn take(self, socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
        let mut bytes = [0; MESSAGE_BYTES];
        let mut vectors = [IoSliceMut::new(&mut bytes[..HEADER_BYTES + self.body_bytes])];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        recvmsg(socket, &mut vectors, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        Ok(fds.next())
    }

    /// Says that it was carried out, if the frontend wants to know.
    ///
    /// # Errors
    ///
    /// Fails if the socket does.
    pub(crate) fn acknowledge(self, socket: &UnixStream) -> io::Result<()> {
        if self.wants_reply { self.answer(socket, 0) } else { Ok(()) }
    }

    /// Answers with a number.
    ///
    /// # Errors
    ///
    /// Fails if the socket does.
    pub(crate) fn answer(self, socket: &UnixStream, value: u64) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(MESSAGE_BYTES);
        for word in [self.request, VERSION | REPLY, 8] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(value.to_le_bytes());
        send(socket, &bytes, SendFlags::NOSIGNAL)
    }
}

/// Where the frontend hears of what it did not ask for.
#[derive(Debug)]
pub(crate) struct Channel(UnixStream);

impl Channel {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(UnixStream::from(fd))
    }

    /// Tells that the configuration is another one. It never waits for the frontend.
    ///
    /// # Errors
    ///
    /// Fails if the frontend does not take messages in.
    pub(crate) fn tell_of_configuration(&self) -> io::Result<()> {
        let message = [CONFIG_CHANGE, VERSION, 0].map(u32::to_le_bytes);
        send(&self.0, message.as_flattened(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }
}

fn send(socket: &UnixStream, bytes: &[u8], flags: SendFlags) -> io::Result<()> {
    let mut control = SendAncillaryBuffer::default();
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn message(request: u32, flags: u32, body: &[u32]) -> Vec<u8> {
        let size = u32::try_from(4 * body.len()).unwrap();
        let words = [&[request, flags, size], body].concat();
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn a_message_is_seen_where_it_is_then_taken_and_answered() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        for (sent, what) in [
            (
                message(SET_VRING_ENABLE, VERSION | NEED_REPLY, &[3, 1]),
                What::Enable { index: 3, enable: true },
            ),
            (message(SET_STATUS, VERSION | NEED_REPLY, &[15, 0]), What::SetStatus(15)),
            (message(GET_STATUS, VERSION | NEED_REPLY, &[]), What::GetStatus),
            (message(SET_BACKEND_REQ_FD, VERSION | NEED_REPLY, &[]), What::Channel),
        ] {
            ours.write_all(&[&sent[..], &message(1, VERSION, &[])].concat()).unwrap();
            let seen = peek(&theirs).unwrap().unwrap();
            assert_eq!(seen.what, what);
            assert_eq!(peek(&theirs).unwrap(), Some(seen));
            assert!(seen.take(&theirs).unwrap().is_none());
            seen.acknowledge(&theirs).unwrap();
            let mut reply = vec![0; MESSAGE_BYTES];
            ours.read_exact(&mut reply).unwrap();
            let request = u32::from_le_bytes(sent[..4].try_into().unwrap());
            assert_eq!(reply, message(request, VERSION | REPLY, &[0, 0]));
            let mut next = vec![0; HEADER_BYTES];
            (&theirs).read_exact(&mut next).unwrap();
            assert_eq!(next, message(1, VERSION, &[]));
        }
    }

    #[test]
    fn other_messages_are_nothing_special() {
        for bytes in [
            message(1, VERSION, &[]),
            message(SET_VRING_ENABLE, VERSION, &[0, 2]),
            message(SET_STATUS, VERSION, &[1]),
            message(GET_STATUS, 2, &[]),
            message(GET_STATUS, VERSION, &[])[..8].to_vec(),
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(&bytes).unwrap();
            assert_eq!(peek(&theirs).unwrap(), None, "{bytes:?}");
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert_eq!(peek(&theirs).unwrap(), None);
    }
}
