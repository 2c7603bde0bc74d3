//! What a successor of this process has to know, in memory that outlives it: how many queue pairs
//! the guest uses.
//!
//! All else follows from the features that the frontend says again (header, offloads), from the
//! command line, or from the tap itself.

use std::sync::atomic::Ordering;

use backend_daemon::process::Estate;
use vm_memory::Bytes as _;

/// Zero means that nothing was written yet.
const VERSION: u32 = 1;
const VERSION_AT: usize = 0;
const ACTIVE_AT: usize = 4;

/// Why what a predecessor left can't be taken up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    /// The memory is too small.
    #[error("there is no room for this device's state in {len_bytes} bytes")]
    Small {
        /// Its length.
        len_bytes: usize,
    },
    /// It is no state of this device.
    #[error("the state has {len_bytes} bytes")]
    Length {
        /// Its length.
        len_bytes: usize,
    },
    /// Another program wrote it.
    #[error("the state has version {version}, and this program knows version {VERSION}")]
    Version {
        /// The version found.
        version: u32,
    },
    /// The device was another one.
    #[error("the guest used {active} of {count} queue pairs")]
    Pairs {
        /// How many it used.
        active: u16,
        /// How many there are.
        count: u16,
    },
}

/// The memory, if the supervisor gave any.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Whole, since its other half hangs up with it.
    estate: Option<Estate>,
}

impl Kept {
    /// Takes up what is there for a device of `count` pairs; gives how many are in use. The first
    /// process finds one in use (virtio 1.3, section 5.1.6.5.6).
    pub(crate) fn take_up(estate: Option<Estate>, count: u16) -> Result<(Self, u16), KeptError> {
        let Some(held) = &estate else { return Ok((Self { estate }, 1)) };
        let small = |_error| KeptError::Small { len_bytes: held.state.len() };
        let memory = held.state.slice();
        let version: u32 = memory.load(VERSION_AT, Ordering::Acquire).map_err(small)?;
        let active: u16 = memory.load(ACTIVE_AT, Ordering::Acquire).map_err(small)?;
        let active = match version {
            0 => 1,
            VERSION if (1..=count).contains(&active) => active,
            VERSION => return Err(KeptError::Pairs { active, count }),
            version => return Err(KeptError::Version { version }),
        };
        let kept = Self { estate };
        kept.write(active);
        Ok((kept, active))
    }

    /// What another process has to know, if this device goes on elsewhere.
    pub(crate) fn save(active: u16) -> Vec<u8> {
        [&VERSION.to_le_bytes()[..], &active.to_le_bytes()].concat()
    }

    /// How many pairs are in use, by what another process saved.
    pub(crate) fn load(state: &[u8], count: u16) -> Result<u16, KeptError> {
        let bytes: &[u8; 6] =
            state.try_into().map_err(|_length| KeptError::Length { len_bytes: state.len() })?;
        let [a, b, c, d, low, high] = *bytes;
        match (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([low, high])) {
            (VERSION, active) if (1..=count).contains(&active) => Ok(active),
            (VERSION, active) => Err(KeptError::Pairs { active, count }),
            (version, _) => Err(KeptError::Version { version }),
        }
    }

    /// Writes down how many pairs are in use.
    pub(crate) fn write(&self, active: u16) {
        let Some(estate) = &self.estate else { return };
        let memory = estate.state.slice();
        // The version last: what it vouches for is there.
        let stored = memory.store(active, ACTIVE_AT, Ordering::Release);
        let stored = stored.and_then(|()| memory.store(VERSION, VERSION_AT, Ordering::Release));
        stored.expect("the memory was read there when it was taken up");
    }
}
