//! From the guest to the tap: one chain, one frame, written at most once.
//!
//! A process that is killed just after a frame was written has not given the chain back. Where chains
//! in flight are marked, its successor sees that and sends none of them. Elsewhere the chain goes
//! back first, and the frame is sent from a copy.

use std::io;
use std::iter;

use backend_daemon::device::DeviceError;
use backend_daemon::ring::{Chain, Ring, RingError, skip};

use crate::drops::Drops;
use crate::header::{Features, HEADER_BYTES, Header, HeaderError};
use crate::sys::MAX_SEGMENTS;
use crate::tap::Tap;

/// Frames in one go; afterwards the worker's other queue has its turn.
const BUDGET: usize = 256;

/// Where a go ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The queue is empty; the guest will kick.
    All,
    /// The tap takes no more; the next frame is still in the queue.
    Blocked,
    /// The budget is used up.
    Some,
}

/// Why one frame was not sent. Never fatal: the chain goes back to the guest.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("its chain is too short for a header")]
    NoHeader,
    #[error("it lies in {segments} pieces")]
    Pieces { segments: usize },
    #[error("the interface is down")]
    Down,
    #[error("the tap refused it: {0}")]
    Tap(io::Error),
}

/// What one attempt came to.
enum Attempt {
    Sent,
    Refused(Refusal),
    Blocked,
}

/// Sends the frames of one transmit queue.
#[derive(Debug)]
pub(crate) struct Transmitter {
    features: Features,
    header_len: usize,
    /// A frame with its header whose chain the guest has back, while the tap does not take it.
    waiting: Option<Vec<u8>>,
    drops: Drops,
}

impl Transmitter {
    pub(crate) fn new() -> Self {
        let drops = Drops::new("frames from the guest");
        Self { features: Features::default(), header_len: HEADER_BYTES, waiting: None, drops }
    }

    /// A new session: what waited has the former one's header.
    pub(crate) fn negotiated(&mut self, features: Features, header_len: usize) {
        (self.features, self.header_len) = (features, header_len);
        self.waiting = None;
    }

    /// Sends what is in the queue, in its order.
    pub(crate) fn send(&mut self, ring: &mut Ring, tap: &Tap) -> Result<Sent, DeviceError> {
        if let Some(frame) = self.waiting.take()
            && !self.send_copy(frame, tap)?
        {
            return Ok(Sent::Blocked);
        }
        for _ in 0..BUDGET {
            let Some(chain) = ring.pop()? else { return Ok(Sent::All) };
            if !ring.is_tracked() {
                if !self.give_back_and_send(ring, chain, tap)? {
                    return Ok(Sent::Blocked);
                }
                continue;
            }
            if chain.is_repeated() {
                // It may be on the wire already; a frame that is lost is sent again by its owner.
                ring.push(chain, 0)?;
                continue;
            }
            match self.attempt(&chain, tap)? {
                Attempt::Sent => {}
                Attempt::Refused(refusal) => self.drops.add(&refusal),
                Attempt::Blocked => {
                    ring.unpop(chain);
                    return Ok(Sent::Blocked);
                }
            }
            ring.push(chain, 0)?;
        }
        Ok(Sent::Some)
    }

    fn attempt(&self, chain: &Chain, tap: &Tap) -> Result<Attempt, DeviceError> {
        let header = match self.header(chain) {
            Ok(header) => header.encode(0),
            Err(refusal) => return Ok(Attempt::Refused(refusal)),
        };
        let frame = skip(chain.readable(), self.header_len as u64);
        match tap.write_frame(&header[..self.header_len], frame) {
            Ok(_) => Ok(Attempt::Sent),
            Err(error) => failed(error),
        }
    }

    /// Gives whether the tap is ready for more.
    fn give_back_and_send(
        &mut self,
        ring: &mut Ring,
        chain: Chain,
        tap: &Tap,
    ) -> Result<bool, DeviceError> {
        let copy = self.copy(&chain);
        ring.push(chain, 0)?;
        match copy {
            Ok(frame) => self.send_copy(frame, tap),
            Err(refusal) => {
                self.drops.add(&refusal);
                Ok(true)
            }
        }
    }

    /// A frame with its header, out of the guest's memory.
    fn copy(&self, chain: &Chain) -> Result<Vec<u8>, Refusal> {
        let header = self.header(chain)?.encode(0);
        let len_bytes = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        let mut frame = vec![0; len_bytes];
        let read = chain.read_at(0, &mut frame);
        read.map_err(|_too_short: RingError| Refusal::NoHeader)?;
        frame[..self.header_len].copy_from_slice(&header[..self.header_len]);
        Ok(frame)
    }

    /// Sends a copy, or lets it wait; gives whether the tap is ready for more.
    fn send_copy(&mut self, frame: Vec<u8>, tap: &Tap) -> Result<bool, DeviceError> {
        let attempt = match tap.write_frame(&frame, iter::empty()) {
            Ok(_) => Attempt::Sent,
            Err(error) => failed(error)?,
        };
        match attempt {
            Attempt::Sent => {}
            Attempt::Refused(refusal) => self.drops.add(&refusal),
            Attempt::Blocked => {
                self.waiting = Some(frame);
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn header(&self, chain: &Chain) -> Result<Header, Refusal> {
        let segments = chain.readable().len();
        if segments > MAX_SEGMENTS {
            return Err(Refusal::Pieces { segments });
        }
        let mut bytes = [0; HEADER_BYTES];
        let read = chain.read_at(0, &mut bytes[..self.header_len]);
        read.map_err(|_too_short: RingError| Refusal::NoHeader)?;
        let len_bytes = chain.readable_len().saturating_sub(self.header_len as u64);
        Ok(Header::outgoing(bytes, len_bytes, self.features)?)
    }
}

/// Tells the tap's "not now" and "not this frame" from the end of the tap.
fn failed(error: io::Error) -> Result<Attempt, DeviceError> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => Ok(Attempt::Blocked),
        Some(libc::EIO | libc::ENETDOWN) => Ok(Attempt::Refused(Refusal::Down)),
        Some(
            libc::EINVAL
            | libc::ENOBUFS
            | libc::ENOMEM
            | libc::EMSGSIZE
            | libc::EFAULT
            | libc::EPERM,
        ) => Ok(Attempt::Refused(Refusal::Tap(error))),
        _ => Err(DeviceError::Host { what: "write a frame to the tap", source: error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(code: i32) -> Result<Attempt, DeviceError> {
        failed(io::Error::from_raw_os_error(code))
    }

    #[test]
    fn a_full_tap_is_waited_for_a_refused_frame_dropped_and_a_lost_tap_fatal() {
        assert!(matches!(outcome(libc::EAGAIN), Ok(Attempt::Blocked)));
        assert!(matches!(outcome(libc::EIO), Ok(Attempt::Refused(Refusal::Down))));
        assert!(matches!(outcome(libc::EINVAL), Ok(Attempt::Refused(Refusal::Tap(_)))));
        assert!(matches!(outcome(libc::EBADFD), Err(DeviceError::Host { .. })));
    }
}
