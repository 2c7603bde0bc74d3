//! What a guest was told of the disk, in memory that outlives the process: enough for a stand-in to
//! say the same of a disk that is gone.
//!
//! The first process of a device writes it down. Its successors show the guest what it knows: only
//! the size may change, when the disk has grown and the guest is told so.

use std::sync::atomic::Ordering;

use backend_daemon::process::Estate;
use vm_memory::Bytes as _;

use crate::request::Limits;

/// Zero means that nothing was written yet.
const VERSION: u32 = 1;
const VERSION_AT: usize = 0;
const FLAGS_AT: usize = 4;
const SIZE_AT: usize = 8;
const BLOCK_AT: usize = 16;

const READ_ONLY: u32 = 1;
const CAN_DISCARD: u32 = 2;
const CAN_ZERO: u32 = 4;

/// Why what a predecessor left can't be taken up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    /// A stand-in has to be somebody's.
    #[error("a stand-in has no predecessor: it takes --state-fd and --store-fd of one")]
    Nobody,
    /// The memory is too small.
    #[error("there is no room for a disk's description in {len_bytes} bytes")]
    Small {
        /// Its length.
        len_bytes: usize,
    },
    /// Another program wrote it.
    #[error("the state has version {version}, and this program knows version {VERSION}")]
    Version {
        /// The version found.
        version: u32,
    },
    /// No program of ours wrote it.
    #[error("the state describes no disk")]
    Nonsense,
}

/// The disk as the guest knows it.
///
/// # Errors
///
/// Fails if nobody wrote it down, or not this program's like.
pub(crate) fn read(estate: Option<&Estate>) -> Result<Limits, KeptError> {
    let memory = estate.ok_or(KeptError::Nobody)?.state.slice();
    let small = |_error| KeptError::Small { len_bytes: memory.len() };
    let load = |at| memory.load::<u64>(at, Ordering::Acquire).map_err(small);
    match memory.load(VERSION_AT, Ordering::Acquire).map_err(small)? {
        0 => return Err(KeptError::Nobody),
        VERSION => {}
        version => return Err(KeptError::Version { version }),
    }
    let flags: u32 = memory.load(FLAGS_AT, Ordering::Acquire).map_err(small)?;
    let (size_bytes, block_bytes) = (load(SIZE_AT)?, load(BLOCK_AT)?);
    let is_block = block_bytes.is_power_of_two() && u32::try_from(block_bytes).is_ok();
    if !is_block || size_bytes == 0 || !size_bytes.is_multiple_of(block_bytes) {
        return Err(KeptError::Nonsense);
    }
    Ok(Limits {
        size_bytes,
        block_bytes,
        read_only: flags & READ_ONLY != 0,
        can_discard: flags & CAN_DISCARD != 0,
        can_zero: flags & CAN_ZERO != 0,
    })
}

/// Writes a disk down, if there is room to and nobody has.
///
/// # Errors
///
/// Fails if what is there is not this program's.
pub(crate) fn write(estate: Option<&Estate>, limits: &Limits) -> Result<(), KeptError> {
    let Some(estate) = estate else { return Ok(()) };
    match read(Some(estate)) {
        Err(KeptError::Nobody) => {}
        known => return known.map(drop),
    }
    let memory = estate.state.slice();
    let small = |_error| KeptError::Small { len_bytes: memory.len() };
    let flags = [
        (READ_ONLY, limits.read_only),
        (CAN_DISCARD, limits.can_discard),
        (CAN_ZERO, limits.can_zero),
    ];
    let flags = flags.iter().filter(|(_flag, is_set)| *is_set).fold(0, |all, (flag, _)| all | flag);
    memory.store(flags, FLAGS_AT, Ordering::Release).map_err(small)?;
    memory.store(limits.size_bytes, SIZE_AT, Ordering::Release).map_err(small)?;
    memory.store(limits.block_bytes, BLOCK_AT, Ordering::Release).map_err(small)?;
    // The version last: what it vouches for is there.
    memory.store(VERSION, VERSION_AT, Ordering::Release).map_err(small)
}

/// The guest is about to be told that the disk has so many bytes.
pub(crate) fn grow(estate: Option<&Estate>, size_bytes: u64) {
    if let Some(estate) = estate
        && let Err(error) = estate.state.slice().store(size_bytes, SIZE_AT, Ordering::Release)
    {
        log::warn!("a successor will not know how large the disk is: {error}");
    }
}
