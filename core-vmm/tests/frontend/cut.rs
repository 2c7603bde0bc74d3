//! A connection to a backend that breaks after so many messages of the frontend's.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
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
    passed: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// A message and the descriptors that belong to it.
type Message = (Vec<u8>, Vec<OwnedFd>);

impl Cut {
    /// Passes `messages` of the frontend's on to `backend`, and all answers back; then hangs up.
    pub(crate) fn after(messages: usize, backend: &UnixStream) -> Self {
        let (frontend, ours) = UnixStream::pair().unwrap();
        let back = (backend.try_clone().unwrap(), ours.try_clone().unwrap());
        let backend = backend.try_clone().unwrap();
        let passed = Arc::<Mutex<Vec<_>>>::default();
        let seen = Arc::clone(&passed);
        let answers = thread::spawn(move || {
            while pass_on(&back.0, &back.1).is_some() {}
            // The backend may have hung up before its time.
            back.1.shutdown(Shutdown::Both).ok();
        });
        thread::spawn(move || {
            let mut left = messages;
            while left > 0
                && let Some(message) = pass_on(&ours, &backend)
            {
                seen.lock().unwrap().push(message);
                left -= 1;
            }
            // What the backend does with the last of them is its own affair, and so is when.
            ours.shutdown(Shutdown::Both).ok();
            backend.shutdown(Shutdown::Both).ok();
            answers.join().unwrap();
        });
        Self { frontend, passed }
    }

    /// The first byte of the body of each of the frontend's messages of this kind.
    pub(crate) fn told(&self, request: u32) -> Vec<u8> {
        let passed = self.passed.lock().unwrap();
        let of_kind = passed.iter().filter(|message| message[..4] == request.to_le_bytes());
        of_kind.map(|message| message[HEADER_BYTES]).collect()
    }
}

/// The message, and nothing at the end of either connection.
fn pass_on(from: &UnixStream, to: &UnixStream) -> Option<Vec<u8>> {
    let (bytes, descriptors) = receive(from)?;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    assert!(borrowed.is_empty() || beside.push(SendAncillaryMessage::ScmRights(&borrowed)));
    sendmsg(to, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL).ok()?;
    Some(bytes)
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
