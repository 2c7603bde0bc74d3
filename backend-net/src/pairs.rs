//! How many queue pairs the guest uses, shared by the workers of one device.
//!
//! The worker with the control queue decides; each worker attaches or detaches its own tap queue
//! when it is woken, so that nobody touches another's tap.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use backend_daemon::process::{BuildError, Estate};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

use crate::kept::Kept;

/// The number of pairs in use, and a bell for each worker.
#[derive(Debug)]
pub(crate) struct Pairs {
    active: AtomicU16,
    kept: Kept,
    bells: Vec<OwnedFd>,
}

impl Pairs {
    /// `count` pairs, of which those are in use that a predecessor's were.
    pub(crate) fn new(count: u16, estate: Option<Estate>) -> Result<Self, BuildError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bells: Result<_, Errno> = (0..count).map(|_| eventfd(0, flags)).collect();
        let bells = bells.map_err(BuildError::resource)?;
        let (kept, active) = Kept::take_up(estate, count).map_err(BuildError::state)?;
        Ok(Self { active: AtomicU16::new(active), kept, bells })
    }

    /// How many pairs there are.
    pub(crate) fn count(&self) -> u16 {
        u16::try_from(self.bells.len()).unwrap_or(u16::MAX)
    }

    /// How many are in use: pair `n` is, if `n` is smaller.
    pub(crate) fn active(&self) -> u16 {
        self.active.load(Ordering::Acquire)
    }

    /// The guest uses `active` pairs from now on; wakes every worker.
    pub(crate) fn set_active(&self, active: u16) {
        if self.active.swap(active, Ordering::AcqRel) != active {
            self.kept.write(active);
            self.bells.iter().for_each(ring);
        }
    }

    /// The bell of the worker of `pair`, readable once rung.
    pub(crate) fn bell(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        self.bells.get(usize::from(pair)).map(AsFd::as_fd)
    }

    /// Makes the bell of `pair` silent again.
    pub(crate) fn silence(&self, pair: u16) {
        if let Some(bell) = self.bell(pair)
            && let Err(error) = read(bell, &mut [0_u8; 8])
            && error != Errno::AGAIN
        {
            log::warn!("cannot read an eventfd: {error}");
        }
    }
}

fn ring(bell: &OwnedFd) {
    if let Err(error) = write(bell, &1_u64.to_ne_bytes())
        && error != Errno::AGAIN
    {
        log::warn!("cannot write an eventfd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pair_is_in_use_and_a_change_rings_every_bell() {
        let pairs = Pairs::new(2, None).unwrap();
        assert_eq!((pairs.count(), pairs.active()), (2, 1));
        pairs.set_active(2);
        assert_eq!(pairs.active(), 2);
        for pair in 0..2 {
            assert_eq!(read(pairs.bell(pair).unwrap(), &mut [0_u8; 8]), Ok(8));
        }
        pairs.set_active(2);
        assert_eq!(read(pairs.bell(0).unwrap(), &mut [0_u8; 8]), Err(Errno::AGAIN));
    }
}
