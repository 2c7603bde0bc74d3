//! A connection to a backend that breaks after so many messages of the frontend's.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const HEADER_BYTES: usize = 12;
const DESCRIPTORS: usize = 8;

/// The frontend's end of it.
pub(crate) struct Cut {
    pub(crate) frontend: UnixStream,
}

/// A message and the descriptors that belong to it.
type Message = (Vec<u8>, Vec<OwnedFd>);

impl Cut {
    /// Passes `messages` of the frontend's on to `backend`, and all answers back; then hangs up.
    pub(crate) fn after(messages: usize, backend: &UnixStream) -> Self {
        let (frontend, ours) = UnixStream::pair().unwrap();
        let back = (backend.try_clone().unwrap(), ours.try_clone().unwrap());
        let backend = backend.try_clone().unwrap();
        let answers = thread::spawn(move || {
            while pass_on(&back.0, &back.1) {}
            // The backend may have hung up before its time.
            back.1.shutdown(Shutdown::Both).ok();
        });
        thread::spawn(move || {
            let mut left = messages;
            while left > 0 && pass_on(&ours, &backend) {
                left -= 1;
            }
            // What the backend does with the last of them is its own affair, and so is when.
            ours.shutdown(Shutdown::Both).ok();
            backend.shutdown(Shutdown::Both).ok();
            answers.join().unwrap();
        });
        Self { frontend }
    }
}

/// False at the end of either connection.
fn pass_on(from: &UnixStream, to: &UnixStream) -> bool {
    let Some((bytes, descriptors)) = receive(from) else { return false };
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    assert!(borrowed.is_empty() || beside.push(SendAncillaryMessage::ScmRights(&borrowed)));
    sendmsg(to, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL).is_ok()
}

/// The header comes alone, so that descriptors are those of its own message.
fn receive(from: &UnixStream) -> Option<Message> {
    let (mut bytes, mut descriptors) = (Vec::new(), Vec::new());
    let mut wanted = HEADER_BYTES;
    while bytes.len() < wanted {
        let mut buffer = vec![0; wanted - bytes.len()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut vectors = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg(from, &mut vectors, &mut beside, RecvFlags::CMSG_CLOEXEC).ok()?;
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 {
            return None;
        }
        bytes.extend(&buffer[..received.bytes]);
        if bytes.len() == HEADER_BYTES {
            let size = u32::from_le_bytes(*bytes.last_chunk().unwrap());
            wanted = HEADER_BYTES + usize::try_from(size).unwrap();
        }
    }
    Some((bytes, descriptors))
}
