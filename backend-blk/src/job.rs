//! A request on its way: which step comes next, and what a step's result means.
//!
//! An engine asks for the [`Step`], has the kernel take it, and reports the result, until the job
//! is finished. A transfer takes several steps if the kernel moves less than it was asked to, or
//! if it goes through a bounce buffer: direct I/O wants aligned memory, and a guest's need not be.

use std::io;

use backend_daemon::ring::{Chain, Segment, skip, take};
use libc::{EAGAIN, EINTR, EOPNOTSUPP};

use crate::disk::Alignment;
use crate::request::{HEADER_BYTES, Operation, Status};

/// The most of a transfer that goes through a bounce buffer at once.
const BOUNCE_BYTES: u64 = 256 << 10;
/// The most pieces of memory that the kernel takes in one call.
const MAX_PIECES: usize = 1024;

/// A request that the disk works on. The memory that its steps point to is the chain's, or the
/// bounce buffer: it stays in place as long as the job exists.
pub(crate) struct Job {
    chain: Chain,
    operation: Operation,
    /// Of a transfer's bytes.
    done: u64,
    bounce: Option<Bounce>,
    /// A write has to be on stable storage before it is answered.
    write_through: bool,
}

/// What the kernel is to do next.
pub(crate) enum Step {
    Read { pieces: Vec<Piece>, offset_bytes: u64 },
    Write { pieces: Vec<Piece>, offset_bytes: u64, write_through: bool },
    Flush,
    Punch { offset_bytes: u64, len_bytes: u64 },
    Zero { offset_bytes: u64, len_bytes: u64 },
}

/// Memory for one step.
pub(crate) enum Piece {
    Guest(Segment),
    Bounce { address: *mut u8, len: usize },
}

/// What a step's result leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    More,
    Finished(Status),
}

/// Memory of our own, aligned.
struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn new(len: u64, align: usize) -> Self {
        let len = usize::try_from(len.min(BOUNCE_BYTES)).unwrap_or_default();
        let bytes = vec![0; len + align];
        let start = bytes.as_ptr().align_offset(align).min(align);
        Self { bytes, start }
    }

    fn part(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

impl Job {
    pub(crate) fn new(
        chain: Chain,
        operation: Operation,
        alignment: Option<Alignment>,
        write_through: bool,
    ) -> Self {
        let mut job = Self { chain, operation, done: 0, bounce: None, write_through };
        if let Some(Alignment { memory, .. }) = alignment
            && let Some(len_bytes) = job.transfer_bytes()
            && !job.segments(len_bytes).all(|segment| is_aligned(&segment, memory))
        {
            job.bounce = Some(Bounce::new(len_bytes, memory));
        }
        job
    }

    /// The next step; asked for once per step.
    pub(crate) fn step(&mut self) -> Step {
        let write_through = self.write_through;
        match self.operation {
            Operation::Read { offset_bytes, len_bytes } => {
                let offset_bytes = offset_bytes + self.done;
                Step::Read { pieces: self.pieces(len_bytes), offset_bytes }
            }
            Operation::Write { offset_bytes, len_bytes } => {
                let offset_bytes = offset_bytes + self.done;
                Step::Write { pieces: self.pieces(len_bytes), offset_bytes, write_through }
            }
            // An identity is answered at once and makes no job; to flush is never wrong.
            Operation::Flush | Operation::Identify => Step::Flush,
            Operation::Discard { offset_bytes, len_bytes }
            | Operation::Zero { offset_bytes, len_bytes, unmap: true } => {
                Step::Punch { offset_bytes, len_bytes }
            }
            Operation::Zero { offset_bytes, len_bytes, unmap: false } => {
                Step::Zero { offset_bytes, len_bytes }
            }
        }
    }

    /// Takes a step's result.
    pub(crate) fn advance(&mut self, result: io::Result<u32>) -> Progress {
        let moved = match result {
            Ok(moved) => moved,
            Err(error) => return self.failed(&error),
        };
        let Some(len_bytes) = self.transfer_bytes() else {
            return Progress::Finished(Status::Ok);
        };
        if moved == 0 {
            log::warn!("the disk ends before its end: was it shortened?");
            return Progress::Finished(Status::IoError);
        }
        if let Err(error) = self.unload(moved as usize) {
            log::debug!("a request's own memory is too short: {error}");
            return Progress::Finished(Status::IoError);
        }
        self.done += u64::from(moved);
        if self.done < len_bytes { Progress::More } else { Progress::Finished(Status::Ok) }
    }

    /// The chain, and how many bytes of it were written if the request ended well.
    pub(crate) fn into_chain(self) -> (Chain, u32) {
        let written = match self.operation {
            Operation::Read { len_bytes, .. } => u32::try_from(len_bytes).unwrap_or_default(),
            _ => 0,
        };
        (self.chain, written)
    }

    fn failed(&self, error: &io::Error) -> Progress {
        match error.raw_os_error() {
            Some(EAGAIN | EINTR) => Progress::More,
            Some(EOPNOTSUPP) if self.transfer_bytes().is_none() => {
                Progress::Finished(Status::Unsupported)
            }
            _ => {
                log::warn!("{:?}: {error}", self.operation);
                Progress::Finished(Status::IoError)
            }
        }
    }

    fn transfer_bytes(&self) -> Option<u64> {
        match self.operation {
            Operation::Read { len_bytes, .. } | Operation::Write { len_bytes, .. } => {
                Some(len_bytes)
            }
            _ => None,
        }
    }

    /// The guest's memory of what is left of the transfer.
    fn segments(&self, len_bytes: u64) -> impl Iterator<Item = Segment> + '_ {
        let (part, offset) = match self.operation {
            Operation::Write { .. } => (self.chain.readable(), HEADER_BYTES),
            _ => (self.chain.writable(), 0),
        };
        take(skip(part, offset + self.done), len_bytes - self.done)
    }

    fn pieces(&mut self, len_bytes: u64) -> Vec<Piece> {
        if self.bounce.is_none() {
            return self.segments(len_bytes).take(MAX_PIECES).map(Piece::Guest).collect();
        }
        self.load(len_bytes).into_iter().collect()
    }

    /// Prepares the bounce buffer for the next step: for a write, with the guest's bytes.
    fn load(&mut self, len_bytes: u64) -> Option<Piece> {
        let bounce = self.bounce.as_mut()?;
        let len = usize::try_from((len_bytes - self.done).min(BOUNCE_BYTES)).ok()?;
        let part = bounce.part(len);
        if matches!(self.operation, Operation::Write { .. }) {
            // The chain was checked to have this much; what it can't give stays as it was.
            self.chain.read_at(HEADER_BYTES + self.done, part).ok()?;
        }
        Some(Piece::Bounce { address: part.as_mut_ptr(), len })
    }

    /// Brings what a step has read into the bounce buffer to the guest.
    fn unload(&mut self, len: usize) -> Result<(), backend_daemon::ring::RingError> {
        match (&mut self.bounce, self.operation) {
            (Some(bounce), Operation::Read { .. }) => {
                self.chain.write_at(self.done, bounce.part(len))
            }
            _ => Ok(()),
        }
    }
}

fn is_aligned(segment: &Segment, align: usize) -> bool {
    (segment.as_ptr() as usize).is_multiple_of(align) && segment.len().is_multiple_of(align)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounce_buffer_is_aligned_and_bounded() {
        let mut bounce = Bounce::new(1 << 30, 4096);
        let part = bounce.part(usize::try_from(BOUNCE_BYTES).unwrap());
        assert_eq!(part.as_ptr() as usize % 4096, 0);
    }
}
