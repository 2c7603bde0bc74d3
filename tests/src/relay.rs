//! A go-between for two stream sockets that passes descriptors on: for a program that takes only
//! the path of a socket, where there is only a connected one.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use anyhow::Result;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

/// How many descriptors one message may carry; vhost-user allows 8 for its memory table.
const DESCRIPTORS: usize = 16;

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
    let mut bytes = vec![0; 1 << 16];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut vectors = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(from, &mut vectors, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 {
            // The other side may be gone already.
            if let Err(error) = shutdown(to, Shutdown::Write) {
                debug_assert_eq!(error, rustix::io::Errno::NOTCONN);
            }
            return Ok(());
        }
        send(to, &bytes[..received.bytes], &descriptors)?;
    }
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
