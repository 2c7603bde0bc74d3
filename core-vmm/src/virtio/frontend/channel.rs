//! Where a backend says what it was not asked: that its configuration is another one.
//!
//! It is a socket pair beside the connection, made anew for each connection. That it closes says
//! nothing about the backend. A backend may be hostile, so a message has a greatest length, a look
//! takes a limited number of bytes, and there is a limit on looks in a second; descriptors beside a
//! message are never taken.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendFlags, SocketFlags, SocketType, recvmsg,
    send, socketpair,
};

/// Request, flags and size of the body, in bytes.
pub(super) const HEADER_BYTES: usize = 12;
/// No request has a longer body.
const MOST_BODY_BYTES: usize = 256;
/// What one look takes.
const LOOK_BYTES: usize = 1024;
/// How often there may be something to hear in a second.
const MOST_LOOKS: u32 = 100;
/// The request that is known.
const CONFIG_CHANGE: u32 = 2;
/// Version 1 of the protocol, in the flags.
pub(super) const VERSION: u32 = 1;
/// The message is a reply.
pub(super) const REPLY: u32 = 1 << 2;
/// An answer is wanted.
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// How a backend misused its channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The channel can't be read.
    #[error("it can't be read")]
    Read(#[source] io::Error),
    /// Longer than any message.
    #[error("a message has {len_bytes} bytes")]
    TooLong {
        /// Without its header.
        len_bytes: u32,
    },
    /// An answer, or of another version.
    #[error("flags {flags:#x} are no request's")]
    NoRequest {
        /// As they came.
        flags: u32,
    },
    /// Too many in a short time.
    #[error("there is no end of messages")]
    TooMany,
}

/// What was heard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// The configuration is another one.
    pub new_configuration: bool,
    /// Nothing will ever be heard again.
    pub closed: bool,
}

/// Our end.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    /// The beginning of a message.
    unread: Vec<u8>,
    since: Instant,
    /// How often something was heard since.
    looks: u32,
}

impl Channel {
    /// A channel, and the backend's end.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self { socket, unread: Vec::new(), since: Instant::now(), looks: 0 }, theirs))
    }

    /// Takes in what has come, without waiting.
    pub(super) fn hear(&mut self) -> Result<Heard, ChannelError> {
        let mut heard = Heard::default();
        let mut bytes = [0; LOOK_BYTES];
        let mut control = RecvAncillaryBuffer::default();
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let vectors = &mut [IoSliceMut::new(&mut bytes)];
        let count = match recvmsg(&self.socket, vectors, &mut control, flags) {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(heard),
            Err(Errno::CONNRESET) => 0,
            Err(errno) => return Err(ChannelError::Read(errno.into())),
        };
        heard.closed = count == 0;
        self.count_look()?;
        self.unread.extend(&bytes[..count]);
        while let Some((header, _)) = self.unread.split_first_chunk::<HEADER_BYTES>() {
            let (words, _) = header.as_chunks();
            let [request, flags, len_bytes] = *words else { break };
            let [request, flags, len_bytes] = [request, flags, len_bytes].map(u32::from_le_bytes);
            let body_bytes = usize::try_from(len_bytes).unwrap_or(usize::MAX);
            if body_bytes > MOST_BODY_BYTES {
                return Err(ChannelError::TooLong { len_bytes });
            }
            if flags & 3 != VERSION || flags & REPLY != 0 {
                return Err(ChannelError::NoRequest { flags });
            }
            if self.unread.len() < HEADER_BYTES + body_bytes {
                break;
            }
            self.unread.drain(..HEADER_BYTES + body_bytes);
            let is_known = request == CONFIG_CHANGE && body_bytes == 0;
            heard.new_configuration |= is_known;
            if flags & NEED_REPLY != 0 {
                self.answer(request, is_known);
            }
        }
        Ok(heard)
    }

    fn count_look(&mut self) -> Result<(), ChannelError> {
        if self.since.elapsed() > Duration::from_secs(1) {
            (self.since, self.looks) = (Instant::now(), 0);
        }
        self.looks += 1;
        if self.looks > MOST_LOOKS { Err(ChannelError::TooMany) } else { Ok(()) }
    }

    /// A backend that does not take its answers in gets none.
    fn answer(&self, request: u32, is_taken: bool) {
        let words = [request, VERSION | REPLY, 8, u32::from(!is_taken), 0].map(u32::to_le_bytes);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if let Err(error) = send(&self.socket, words.as_flattened(), flags) {
            log::debug!("a backend does not hear the answer to its message: {error}");
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const CHANGED: Heard = Heard { new_configuration: true, closed: false };
    const NOTHING: Heard = Heard { new_configuration: false, closed: false };

    fn channel() -> (Channel, UnixStream) {
        let (channel, theirs) = Channel::new().unwrap();
        (channel, theirs.into())
    }

    fn message(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn a_new_configuration_is_heard_of_however_the_message_is_cut() {
        let (mut channel, mut theirs) = channel();
        assert_eq!(channel.hear().unwrap(), NOTHING);
        let change = message(&[CONFIG_CHANGE, VERSION, 0]);
        theirs.write_all(&change[..5]).unwrap();
        assert_eq!(channel.hear().unwrap(), NOTHING);
        theirs.write_all(&change[5..]).unwrap();
        assert_eq!(channel.hear().unwrap(), CHANGED);
        theirs.write_all(&change.repeat(3)).unwrap();
        assert_eq!(channel.hear().unwrap(), CHANGED, "once for all");
        assert_eq!(channel.hear().unwrap(), NOTHING);
    }

    #[test]
    fn other_requests_are_refused_and_the_next_one_is_heard() {
        let (mut channel, mut theirs) = channel();
        let words = [1, VERSION | NEED_REPLY, 4, 7, CONFIG_CHANGE, VERSION | NEED_REPLY, 0];
        theirs.write_all(&message(&words)).unwrap();
        assert_eq!(channel.hear().unwrap(), CHANGED);
        let mut answers = [0; 40];
        theirs.read_exact(&mut answers).unwrap();
        let refused = [1, VERSION | REPLY, 8, 1, 0];
        let taken = [CONFIG_CHANGE, VERSION | REPLY, 8, 0, 0];
        assert_eq!(answers[..], message(&[refused, taken].concat()));
    }

    #[test]
    fn nonsense_is_an_error_and_the_end_is_none() {
        for (words, what) in [
            ([CONFIG_CHANGE, VERSION, u32::MAX], "bytes"),
            ([CONFIG_CHANGE, VERSION | REPLY, 0], "flags"),
            ([CONFIG_CHANGE, 2, 0], "flags"),
        ] {
            let (mut channel, mut theirs) = channel();
            theirs.write_all(&message(&words)).unwrap();
            assert!(channel.hear().unwrap_err().to_string().contains(what), "{words:?}");
        }
        let (mut channel, theirs) = channel();
        drop(theirs);
        assert_eq!(channel.hear().unwrap(), Heard { new_configuration: false, closed: true });
    }

    #[test]
    fn a_flood_is_an_error() {
        let (mut channel, mut theirs) = channel();
        let change = message(&[CONFIG_CHANGE, VERSION, 0]);
        let flood = (0..2 * MOST_LOOKS).find_map(|_look| {
            theirs.write_all(&change).unwrap();
            channel.hear().err()
        });
        assert!(matches!(flood, Some(ChannelError::TooMany)));
    }
}
