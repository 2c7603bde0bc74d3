//! A go-between for a vhost-user frontend and its backend: for a frontend that takes only the path
//! of a socket, where there is only a connected one.
//!
//! ```text
//!   frontend <-- a message, its descriptors --> relay <-- the same --> backend
//! ```
//!
//! It reads message by message. Descriptors belong to their message's first byte, and a read of
//! whatever there is gives them together with the bytes of messages before theirs: passed on like
//! that, they would reach the backend with the wrong message.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use anyhow::{Result, ensure};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

/// How many descriptors one message may carry; vhost-user allows 8 for its memory table.
const DESCRIPTORS: usize = 16;
/// Request, flags and the size of what follows: u32 each.
const HEADER_BYTES: usize = 12;
/// More than any message has.
const MAX_BODY_BYTES: u32 = 1 << 16;

/// Passes everything on in both directions until both sides ended.
///
/// # Errors
///
/// Fails if a socket does.
pub fn run(left: &OwnedFd, right: &OwnedFd) -> Result<()> {
    thread::scope(|scope| {
        let back = scope.spawn(|| one_way(right.as_fd(), left.as_fd()));
        let there = one_way(left.as_fd(), right.as_fd());
        there.and(back.join().unwrap_or(Ok(())))
    })
}

fn one_way(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    while let Some((bytes, descriptors)) = message(from)? {
        send(to, &bytes, &descriptors)?;
    }
    // The other side may be gone already.
    match shutdown(to, Shutdown::Write) {
        Ok(()) | Err(Errno::NOTCONN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The next message with its descriptors, or none at the connection's end.
fn message(from: BorrowedFd<'_>) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut header = [0; HEADER_BYTES];
    let mut descriptors = Vec::new();
    if !fill(from, &mut header, &mut descriptors)? {
        return Ok(None);
    }
    let size = header.last_chunk().map_or(0, |size| u32::from_le_bytes(*size));
    ensure!(size <= MAX_BODY_BYTES, "a message of {size} bytes");
    let mut bytes = header.to_vec();
    bytes.resize(HEADER_BYTES + size as usize, 0);
    ensure!(fill(from, &mut bytes[HEADER_BYTES..], &mut descriptors)?, "a message without an end");
    Ok(Some((bytes, descriptors)))
}

/// Reads until `bytes` are full; false if the connection ended before the first of them.
fn fill(from: BorrowedFd<'_>, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<bool> {
    let mut filled = 0;
    while filled < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut vectors = [IoSliceMut::new(&mut bytes[filled..])];
        let received = recvmsg(from, &mut vectors, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 {
            ensure!(filled == 0, "a message without an end");
            return Ok(false);
        }
        filled += received.bytes;
    }
    Ok(true)
}

fn send(to: BorrowedFd<'_>, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<()> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    let mut sent = sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    while sent < bytes.len() {
        sent += rustix::net::send(to, &bytes[sent..], SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write, pipe};
    use std::net;
    use std::os::unix::net::UnixStream;

    use anyhow::Context;

    use super::*;

    fn words(words: [u32; 5]) -> Vec<u8> {
        words.map(u32::to_le_bytes).as_flattened().to_vec()
    }

    #[test]
    fn descriptors_arrive_with_their_own_message() -> Result<()> {
        let (frontend, left) = UnixStream::pair()?;
        let (right, mut backend) = UnixStream::pair()?;
        let (bare, with_one) = (words([8, 1, 8, 0, 256]), words([12, 1, 8, 0, 0]));
        // Both wait already when the relay first looks.
        (&frontend).write_all(&bare)?;
        let (reader, mut writer) = pipe()?;
        send(frontend.as_fd(), &with_one, &[reader.into()])?;
        frontend.shutdown(net::Shutdown::Write)?;
        one_way(left.as_fd(), right.as_fd())?;
        assert_eq!(
            message(backend.as_fd())?.map(|(bytes, fds)| (bytes, fds.len())),
            Some((bare, 0))
        );
        let (bytes, mut descriptors) = message(backend.as_fd())?.context("no second message")?;
        assert_eq!((bytes, descriptors.len()), (with_one, 1));
        writer.write_all(b"it")?;
        drop(writer);
        let mut read = String::new();
        File::from(descriptors.remove(0)).read_to_string(&mut read)?;
        assert_eq!(read, "it");
        assert_eq!(backend.read(&mut [0])?, 0);
        Ok(())
    }
}
