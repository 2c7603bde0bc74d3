//! How much memory the VMM may lock: a device reads and writes the guest's memory by itself, so all
//! of it has to stay in place, once for each device's container.

use std::io;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

use crate::{passthrough::PassthroughError, size::ByteSize};

/// How many devices are reckoned with once a sandbox is given one while it runs.
pub const MOST_DEVICES: usize = 32;
/// What the VMM locks beside the guest's memory, at most.
const BESIDE_BYTES: u64 = 64 << 20;

/// What `devices` devices of a guest with so much memory need, in bytes.
#[must_use]
pub fn needed(memory: ByteSize, devices: usize) -> u64 {
    let devices = u64::try_from(devices).unwrap_or(u64::MAX);
    memory.0.saturating_mul(devices).saturating_add(BESIDE_BYTES)
}

/// A higher limit of this process, which its children inherit; dropping it gives the old one back.
#[derive(Debug)]
pub struct Raised {
    before: Option<Rlimit>,
}

impl Raised {
    /// Raises the limit to `needed` bytes, where it is lower.
    ///
    /// # Errors
    ///
    /// Fails if this process may not.
    pub fn to(needed: u64) -> Result<Self, PassthroughError> {
        let before = getrlimit(Resource::Memlock);
        let Some(higher) = higher(before, needed) else { return Ok(Self { before: None }) };
        setrlimit(Resource::Memlock, higher)
            .map_err(|error| refused(needed, before, error.into()))?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = setrlimit(Resource::Memlock, before)
        {
            log::warn!("RLIMIT_MEMLOCK stays raised: {error}");
        }
    }
}

/// Raises the limit of a process that runs to `needed` bytes, where it is lower.
///
/// # Errors
///
/// Fails if this process may not.
pub fn raise(process: Pid, needed: u64) -> Result<(), PassthroughError> {
    let before = getrlimit(Resource::Memlock);
    // The limit that is set stands whether or not it was higher before.
    let of_process = Rlimit { current: Some(needed), maximum: Some(needed) };
    let was = prlimit(Some(process), Resource::Memlock, of_process)
        .map_err(|error| refused(needed, before, error.into()))?;
    if higher(was, needed).is_none() {
        prlimit(Some(process), Resource::Memlock, was)
            .map_err(|error| refused(needed, was, error.into()))?;
    }
    Ok(())
}

/// The limit to be set, if `before` is too low.
fn higher(before: Rlimit, needed: u64) -> Option<Rlimit> {
    if before.current.is_none_or(|current| current >= needed) {
        return None;
    }
    let maximum = before.maximum.map(|maximum| maximum.max(needed));
    Some(Rlimit { current: Some(needed), maximum })
}

fn refused(needed: u64, before: Rlimit, source: io::Error) -> PassthroughError {
    let limit = before.current.unwrap_or(u64::MAX);
    PassthroughError::Memlock { needed, limit, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_locks_the_whole_memory() {
        assert_eq!(needed(ByteSize(1 << 30), 2), (2 << 30) + BESIDE_BYTES);
        assert_eq!(needed(ByteSize(u64::MAX), 2), u64::MAX);
    }

    #[test]
    fn a_limit_is_raised_only_where_it_is_too_low() {
        let limit = |current, maximum| Rlimit { current, maximum };
        assert_eq!(higher(limit(None, None), 5), None);
        assert_eq!(higher(limit(Some(5), Some(5)), 5), None);
        assert_eq!(higher(limit(Some(4), Some(9)), 5), Some(limit(Some(5), Some(9))));
        assert_eq!(higher(limit(Some(4), Some(4)), 5), Some(limit(Some(5), Some(5))));
        assert_eq!(higher(limit(Some(4), None), 5), Some(limit(Some(5), None)));
    }
}
