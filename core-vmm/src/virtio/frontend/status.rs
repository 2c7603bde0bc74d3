//! The driver's view of the device, told to a backend that wants it (vhost-user,
//! `VHOST_USER_PROTOCOL_F_STATUS`).
//!
//! The `vhost` crate has no code for these two messages, so they are put on the connection beside
//! it, between two of its own.

use std::io::{self, IoSliceMut};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendFlags, recvmsg, send};

use super::channel::{HEADER_BYTES, NEED_REPLY, REPLY, VERSION};
use crate::virtio::pci_registers::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};

const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;
/// The body of all these messages but the question, in bytes.
const BODY_BYTES: u32 = 8;

/// What a driver sets one after the other (virtio 1.3, section 3.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// No driver, or one that has reset the device.
    Reset,
    /// Features are agreed upon.
    Features,
    /// The rings are set up.
    Ready,
}

impl Stage {
    fn bits(self) -> u8 {
        match self {
            Self::Reset => 0,
            Self::Features => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            Self::Ready => ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        }
    }
}

/// Tells it, and waits for the acknowledgement if there is one.
///
/// # Errors
///
/// Fails if the socket does, or the backend refuses or answers something else.
pub(super) fn tell(socket: &UnixStream, stage: Stage, acknowledged: bool) -> io::Result<()> {
    let flags = if acknowledged { VERSION | NEED_REPLY } else { VERSION };
    put(socket, &[SET_STATUS, flags, BODY_BYTES, stage.bits().into(), 0])?;
    if acknowledged && answer(socket, SET_STATUS)? != 0 {
        return Err(io::Error::other("the backend refuses the device's status"));
    }
    Ok(())
}

/// Whether the backend agrees to the features: it may take the bit back.
///
/// # Errors
///
/// Fails if the socket does, or the backend answers something else.
pub(super) fn has_agreed(socket: &UnixStream) -> io::Result<bool> {
    put(socket, &[GET_STATUS, VERSION, 0])?;
    Ok(answer(socket, GET_STATUS)? & u64::from(FEATURES_OK) != 0)
}

fn put(socket: &UnixStream, words: &[u32]) -> io::Result<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let sent = send(socket, &bytes, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn answer(socket: &UnixStream, request: u32) -> io::Result<u64> {
    let header: [u8; HEADER_BYTES] = take(socket)?;
    let (words, _) = header.as_chunks();
    let words: Vec<_> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let expected = [request, VERSION | REPLY, BODY_BYTES];
    if words != expected {
        let text = format!("{words:x?} is not the header of the answer {expected:x?}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(u64::from_le_bytes(take(socket)?))
}

/// So many bytes; descriptors beside them are not taken.
fn take<const LEN: usize>(socket: &UnixStream) -> io::Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    let mut have = 0;
    while have < LEN {
        let vectors = &mut [IoSliceMut::new(&mut bytes[have..])];
        let mut control = RecvAncillaryBuffer::default();
        match recvmsg(socket, vectors, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) if received.bytes == 0 => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(received) => have += received.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn a_stage_is_told_in_the_specifications_bytes() {
        for (stage, bits) in [(Stage::Reset, 0), (Stage::Features, 11), (Stage::Ready, 15)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            tell(&ours, stage, false).unwrap();
            let mut told = [0; 20];
            theirs.read_exact(&mut told).unwrap();
            assert_eq!(told.to_vec(), words(&[39, 1, 8, bits, 0]));
        }
    }

    #[test]
    fn a_refusal_and_an_answer_to_something_else_are_errors() {
        for (answer, is_taken) in
            [([39, 5, 8, 0, 0], true), ([39, 5, 8, 1, 0], false), ([40, 5, 8, 0, 0], false)]
        {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&words(&answer)).unwrap();
            assert_eq!(tell(&ours, Stage::Ready, true).is_ok(), is_taken, "{answer:?}");
        }
    }

    #[test]
    fn features_are_agreed_upon_only_if_the_backend_says_so() {
        for (bits, has_agreed_now) in [(11, true), (3, false), (15, true)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let answer = words(&[40, 5, 8, bits, 0]);
            for byte in answer {
                theirs.write_all(&[byte]).unwrap();
            }
            assert_eq!(has_agreed(&ours).unwrap(), has_agreed_now);
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(has_agreed(&ours).is_err());
    }
}
