//! From the tap to the guest: one frame, read straight into as many chains as it needs.
//!
//! How long a frame is shows only once it has been read. So a few chains are taken, enough for
//! what came last; what does not fit spills into a buffer of our own and is copied into further
//! chains. Chains that are not needed go back untouched. If the guest has none left, the frame
//! waits with what it has, and the tap is not read: the kernel's queue holds the rest.

use std::io;

use backend_daemon::device::DeviceError;
use backend_daemon::ring::{Chain, Ring, Segment, skip};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use crate::drops::Drops;
use crate::header::{Features, HEADER_BYTES, Header, HeaderError, MAX_FRAME_BYTES};
use crate::sys::MAX_SEGMENTS;
use crate::tap::Tap;

/// Frames in one go; afterwards the worker's other queue has its turn.
const BUDGET: usize = 256;
/// One byte more than the longest frame, so that a longer one is noticed.
const SPILL_BYTES: usize = 65_535 + 18 + 1;
const _: () = assert!(SPILL_BYTES as u64 == MAX_FRAME_BYTES + 1);

/// Where a go ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// The tap has nothing more.
    All,
    /// The guest has no buffers; it will kick.
    NoBuffers,
    /// The budget is used up.
    Some,
}

/// Why one frame did not reach the guest.
#[derive(Debug, thiserror::Error)]
enum Loss {
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("the guest's buffer holds {capacity_bytes} of its {len_bytes} bytes")]
    TooLong { capacity_bytes: u64, len_bytes: u64 },
    #[error("the queue stopped while it waited for buffers")]
    Stopped,
}

/// What one step came to.
enum Step {
    /// A frame was delivered or dropped.
    Done,
    TapEmpty,
    NoBuffers,
}

/// A frame that was read, and the chains that hold its beginning.
struct Frame {
    header: Header,
    /// Header included.
    len_bytes: u64,
    chains: Vec<Chain>,
    capacity_bytes: u64,
    /// How many bytes of the spill have been copied into chains.
    copied_bytes: usize,
}

/// Fills the buffers of one receive queue.
pub(crate) struct Receiver {
    features: Features,
    header_len: usize,
    /// How many bytes to have chains for before the next read.
    expected_bytes: u64,
    spill: Box<[u8]>,
    waiting: Option<Frame>,
    drops: Drops,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self {
            features: Features::default(),
            header_len: HEADER_BYTES,
            expected_bytes: 0,
            spill: vec![0; SPILL_BYTES].into_boxed_slice(),
            waiting: None,
            drops: Drops::new("frames to the guest"),
        }
    }

    /// A new session: what waited belongs to rings that are gone.
    pub(crate) fn negotiated(&mut self, features: Features, header_len: usize) {
        (self.features, self.header_len) = (features, header_len);
        self.waiting = None;
    }

    /// Moves frames until the tap is empty or the guest has no buffers.
    pub(crate) fn receive(&mut self, ring: &mut Ring, tap: &Tap) -> Result<Received, DeviceError> {
        for _ in 0..BUDGET {
            let step = match self.waiting.take() {
                Some(frame) => self.finish(ring, frame)?,
                None => self.step(ring, tap)?,
            };
            match step {
                Step::Done => {}
                Step::TapEmpty => return Ok(Received::All),
                Step::NoBuffers => return Ok(Received::NoBuffers),
            }
        }
        Ok(Received::Some)
    }

    /// The queue stops: gives back what a waiting frame holds, and loses the frame.
    pub(crate) fn abandon(&mut self, ring: &mut Ring) {
        if let Some(frame) = self.waiting.take() {
            put_back(ring, frame.chains);
            self.drops.add(&Loss::Stopped);
        }
    }

    fn step(&mut self, ring: &mut Ring, tap: &Tap) -> Result<Step, DeviceError> {
        let chains = self.gather(ring)?;
        let Some(first) = chains.first() else { return Ok(Step::NoBuffers) };
        let mut segments: Vec<Segment> = skip(first.writable(), self.header_len as u64).collect();
        segments.extend(chains[1..].iter().flat_map(Chain::writable));
        let mut header = [0; HEADER_BYTES];
        let read = tap.read_frame(&mut header[..self.header_len], &segments, &mut self.spill);
        let len_bytes = match read {
            Ok(bytes) => bytes as u64,
            Err(error) => {
                put_back(ring, chains);
                return nothing_read(error);
            }
        };
        // Follows a longer frame at once and a run of shorter ones slowly.
        self.expected_bytes = len_bytes.max(self.expected_bytes / 8 * 7);
        let frame_bytes = len_bytes.saturating_sub(self.header_len as u64);
        match Header::incoming(header, frame_bytes, self.features) {
            Ok(header) => {
                let capacity_bytes = chains.iter().map(Chain::writable_len).sum();
                let frame = Frame { header, len_bytes, chains, capacity_bytes, copied_bytes: 0 };
                self.finish(ring, frame)
            }
            Err(error) => Ok(self.lose(ring, chains, &error.into())),
        }
    }

    /// Takes chains for the next frame, none if there are none.
    fn gather(&mut self, ring: &mut Ring) -> Result<Vec<Chain>, DeviceError> {
        let mut chains: Vec<Chain> = Vec::new();
        let (mut capacity_bytes, mut segments) = (0, 0);
        while chains.is_empty() || self.mergeable() && capacity_bytes < self.expected_bytes {
            let Some(chain) = ring.pop()? else { break };
            let fits = segments + chain.writable().len() <= MAX_SEGMENTS;
            if chains.is_empty() && (chain.writable_len() < self.header_len as u64 || !fits) {
                // No frame will ever fit there.
                ring.push(chain, 0)?;
            } else if !fits || chain.writable_len() == 0 {
                ring.unpop(chain);
                break;
            } else {
                capacity_bytes += chain.writable_len();
                segments += chain.writable().len();
                chains.push(chain);
            }
        }
        Ok(chains)
    }

    /// Copies what spilled into further chains, then hands the frame over; or lets it wait.
    fn finish(&mut self, ring: &mut Ring, mut frame: Frame) -> Result<Step, DeviceError> {
        while frame.capacity_bytes < frame.len_bytes {
            let Frame { capacity_bytes, len_bytes, .. } = frame;
            let too_long = Loss::TooLong { capacity_bytes, len_bytes };
            if !self.mergeable() || frame.chains.len() >= usize::from(ring.size()) {
                return Ok(self.lose(ring, frame.chains, &too_long));
            }
            let Some(chain) = ring.pop()? else {
                self.waiting = Some(frame);
                return Ok(Step::NoBuffers);
            };
            if chain.writable_len() == 0 {
                ring.unpop(chain);
                return Ok(self.lose(ring, frame.chains, &too_long));
            }
            let missing = usize::try_from(len_bytes - capacity_bytes).unwrap_or(usize::MAX);
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
            let spilled = &self.spill[frame.copied_bytes..][..missing.min(room)];
            chain.write_at(0, spilled)?;
            frame.copied_bytes += spilled.len();
            frame.capacity_bytes += chain.writable_len();
            frame.chains.push(chain);
        }
        self.deliver(ring, frame)
    }

    fn deliver(&self, ring: &mut Ring, frame: Frame) -> Result<Step, DeviceError> {
        let Frame { header, len_bytes, mut chains, .. } = frame;
        let lens: Vec<u64> = chains.iter().map(Chain::writable_len).collect();
        let written = split(len_bytes, &lens);
        put_back(ring, chains.split_off(written.len()));
        let count = u16::try_from(written.len()).unwrap_or(u16::MAX);
        if let Some(first) = chains.first() {
            first.write_at(0, &header.encode(count)[..self.header_len])?;
        }
        // The guest must never see a part of a frame (virtio 1.3, section 5.1.6.4.1).
        ring.push_together(chains.into_iter().zip(written))?;
        Ok(Step::Done)
    }

    fn lose(&mut self, ring: &mut Ring, chains: Vec<Chain>, loss: &Loss) -> Step {
        put_back(ring, chains);
        self.drops.add(loss);
        Step::Done
    }

    fn mergeable(&self) -> bool {
        self.features.has(VIRTIO_NET_F_MRG_RXBUF)
    }
}

/// How many bytes of a frame each buffer gets; as many buffers as the frame needs.
fn split(len_bytes: u64, buffers: &[u64]) -> Vec<u32> {
    let mut left = len_bytes;
    let mut parts = Vec::new();
    for buffer in buffers {
        if left == 0 {
            break;
        }
        let part = left.min(*buffer);
        parts.push(u32::try_from(part).unwrap_or(u32::MAX));
        left -= part;
    }
    parts
}

/// Puts chains back that were not needed, so that they are taken again in the same order.
fn put_back(ring: &mut Ring, chains: Vec<Chain>) {
    for chain in chains.into_iter().rev() {
        ring.unpop(chain);
    }
}

/// Tells "no frame" and "the interface is down" from the end of the tap.
fn nothing_read(error: io::Error) -> Result<Step, DeviceError> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR | libc::EIO | libc::ENETDOWN) => Ok(Step::TapEmpty),
        _ => Err(DeviceError::Host { what: "read a frame from the tap", source: error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_takes_as_many_buffers_as_it_needs_and_no_more() {
        assert_eq!(split(72, &[2000, 2000]), [72]);
        assert_eq!(split(2000, &[2000, 2000]), [2000]);
        assert_eq!(split(4001, &[2000, 2000, 2000]), [2000, 2000, 1]);
    }

    #[test]
    fn an_empty_tap_and_a_down_interface_are_no_failure_but_a_lost_tap_is() {
        let outcome = |code| nothing_read(io::Error::from_raw_os_error(code));
        assert!(matches!(outcome(libc::EAGAIN), Ok(Step::TapEmpty)));
        assert!(matches!(outcome(libc::EIO), Ok(Step::TapEmpty)));
        assert!(matches!(outcome(libc::EBADFD), Err(DeviceError::Host { .. })));
    }

    #[test]
    fn drops_are_counted() {
        let mut receiver = Receiver::new();
        receiver.drops.add(&Loss::Stopped);
        assert_eq!(receiver.drops.count(), 1);
    }
}
