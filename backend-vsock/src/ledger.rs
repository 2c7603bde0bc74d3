//! What a successor must know, in memory that outlives the process: the header's words, a record
//! for each connection, the resets that are owed, and each connection's bytes for its program.
//!
//! Everything but the bytes is changed by transactions: [`Ledger::set`] and its like only stage,
//! and [`Ledger::commit`] makes all that is staged true at once, wherever the process is killed.
//! A redo log does it: the new values are written down beside the old ones, one store says that they
//! are whole, then they are copied into place. A successor that finds a whole log copies once more.
//!
//! ```text
//!        0  version, shape
//!       16  the header's words
//!      512  the log: how many stores, then the place and value of each
//!     4096  resets, a ring of RESETS_MAX
//!    12288  records, RECORD_STRIDE each
//!   143360  areas, AREA_BYTES each: a ring of bytes; only those that a record counts mean anything
//! ```
//!
//! The memory belongs to this process and its successors alone; what stands in it is checked all
//! the same, so that a broken predecessor costs connections and nothing else.

mod resets;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use backend_daemon::process::{EstateError, State};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{Bytes, VolatileSlice};

use crate::credit::BUFFER_BYTES;
use crate::death;
use crate::keep::GENERATION_MAX;
use crate::packet::Cid;
use crate::sys;
use crate::table::CONNECTIONS_MAX;

/// The most resets that wait for room in the RX ring.
pub const RESETS_MAX: usize = 256;
/// One connection's bytes: the guest's credit, and a page for the greeting.
pub const AREA_BYTES: usize = AREA_LEN as usize;
/// The same, as positions are counted in it.
pub(crate) const AREA_LEN: u32 = BUFFER_BYTES + 4096;
/// How much memory a ledger takes; most of it is never touched.
pub const STATE_BYTES: usize = AREAS + CONNECTIONS_MAX * AREA_BYTES;
/// The words of one connection's record.
pub const RECORD_WORDS: usize = 12;

/// What [`Ledger::record`] gives: all zero if the slot is free.
pub type Record = [u64; RECORD_WORDS];

/// Of this layout and of what the words mean; 0 means that nothing was written yet.
const VERSION: u64 = 1;
const SHAPE: u64 = (CONNECTIONS_MAX as u64) << 32 | AREA_BYTES as u64;
const HEADER: usize = 16;
const LOG: usize = 512;
const LOG_MAX: usize = 64;
const RESETS: usize = 4096;
const RECORDS: usize = RESETS + RESETS_MAX * resets::STRIDE;
const RECORD_STRIDE: usize = 128;
const AREAS: usize = RECORDS + CONNECTIONS_MAX * RECORD_STRIDE;

const IN_BOUNDS: &str = "the memory was checked to be large enough, and each word is aligned";

/// The words of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The guest's context id.
    Cid,
    /// The features that were negotiated.
    Features,
    /// Of the connection that was inserted last; counts from 1.
    Generation,
    /// The host port for the next host program.
    NextHostPort,
    /// How many chains of the TX ring were dealt with, modulo 2^16: the position of the next.
    TxDone,
    /// The same for the RX ring.
    RxDone,
    /// How many bytes the last of these has in it.
    RxLen,
    /// How many resets were sent.
    ResetsSent,
    /// How many resets were owed.
    ResetsOwed,
    /// Bytes of a host program that are with the guest and have to leave its socket: see [`Part`].
    Taking,
    /// Bytes for a host program that are in the pipe: see [`Part`].
    Sending,
    /// What the guest has to hear, as `device.rs` puts it.
    News,
}

const WORDS: usize = 12;

/// A number of bytes of one connection, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The connection's.
    pub slot: usize,
    /// How many.
    pub len_bytes: u32,
}

impl Part {
    fn encode(part: Option<Self>) -> u64 {
        part.map_or(0, |part| (part.slot as u64 + 1) << 32 | u64::from(part.len_bytes))
    }

    fn decode(word: u64) -> Option<Self> {
        let slot = usize::try_from(word >> 32).ok()?.checked_sub(1)?;
        Some(Self { slot, len_bytes: low(word) })
    }
}

/// The lower half of a word.
#[must_use]
pub fn low(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// The upper half of a word.
#[must_use]
pub fn high(word: u64) -> u32 {
    low(word >> 32)
}

/// Two halves in a word.
#[must_use]
pub fn word(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// Why there is no ledger.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The host has no memory for one.
    #[error("cannot make memory for the connections")]
    Make(#[source] io::Error),
    /// What was made can't be used.
    #[error("cannot use memory for the connections")]
    Map(#[from] EstateError),
    /// The supervisor gave too little.
    #[error("{len_bytes} bytes are too few for the connections, which take {STATE_BYTES}")]
    TooSmall {
        /// What it gave.
        len_bytes: usize,
    },
    /// Somebody else's.
    #[error(
        "the connections were written down by version {0}, and this program knows version {VERSION}"
    )]
    Version(u64),
    /// Written by a program with other limits.
    #[error("the connections were written down in another shape")]
    Shape,
    /// It belongs to another machine.
    #[error("the connections are those of context id {0}")]
    OtherGuest(u64),
    /// It contradicts itself.
    #[error("what was written down of the connections makes no sense: {0}")]
    Nonsense(&'static str),
}

/// The state that outlives the process, in the hands of the one that serves the device.
#[derive(Debug)]
pub struct Ledger {
    state: State,
    /// What the memory says, with all that is staged.
    words: [u64; WORDS],
    records: Vec<Record>,
    staged: Vec<(usize, u64)>,
}

impl Ledger {
    /// Takes up what a predecessor left in `state`, or begins.
    ///
    /// # Errors
    ///
    /// Fails if what stands there can't be read; it is not changed then.
    pub fn open(state: State, cid: Cid) -> Result<Self, LedgerError> {
        if state.len() < STATE_BYTES {
            return Err(LedgerError::TooSmall { len_bytes: state.len() });
        }
        let (words, records) = ([0; WORDS], vec![[0; RECORD_WORDS]; CONNECTIONS_MAX]);
        let mut ledger = Self { state, words, records, staged: Vec::new() };
        match ledger.load(0) {
            0 => ledger.begin(cid),
            VERSION if ledger.load(8) != SHAPE => return Err(LedgerError::Shape),
            VERSION => ledger.redo()?,
            other => return Err(LedgerError::Version(other)),
        }
        for word in 0..WORDS {
            ledger.words[word] = ledger.load(HEADER + 8 * word);
        }
        // The others are all zero, in memory too.
        for slot in 0..CONNECTIONS_MAX {
            for word in 0..RECORD_WORDS {
                ledger.records[slot][word] = ledger.load(record_at(slot) + 8 * word);
                if ledger.records[slot][0] == 0 {
                    break;
                }
            }
        }
        if ledger.get(Word::Cid) != cid.0 {
            return Err(LedgerError::OtherGuest(ledger.get(Word::Cid)));
        }
        if ledger.get(Word::Generation) > GENERATION_MAX {
            return Err(LedgerError::Nonsense("there were too many connections"));
        }
        ledger.check_resets()?;
        Ok(ledger)
    }

    /// One that nobody will take up.
    ///
    /// # Errors
    ///
    /// Fails if the host has no memory.
    pub fn alone(cid: Cid) -> Result<Self, LedgerError> {
        Self::open(State::map(memory().map_err(LedgerError::Make)?)?, cid)
    }

    /// A word of the header.
    #[must_use]
    pub fn get(&self, word: Word) -> u64 {
        self.words[word as usize]
    }

    /// The lower 16 bits of a word: a ring's position.
    #[must_use]
    pub fn position(&self, word: Word) -> u16 {
        u16::try_from(self.get(word) & 0xffff).unwrap_or(0)
    }

    /// Bytes that a word speaks of.
    #[must_use]
    pub fn part(&self, word: Word) -> Option<Part> {
        Part::decode(self.get(word))
    }

    /// A connection's record.
    #[must_use]
    pub fn record(&self, slot: usize) -> &Record {
        &self.records[slot]
    }

    /// Stages a word of the header.
    pub fn set(&mut self, word: Word, value: impl Into<u64>) {
        let (word, value) = (word as usize, value.into());
        if self.words[word] != value {
            self.words[word] = value;
            self.stage(HEADER + 8 * word, value);
        }
    }

    /// Stages bytes that a word speaks of.
    pub fn set_part(&mut self, word: Word, part: Option<Part>) {
        self.set(word, Part::encode(part));
    }

    /// Stages a connection's record.
    pub fn set_record(&mut self, slot: usize, record: &Record) {
        for (word, value) in record.iter().enumerate() {
            if self.records[slot][word] != *value {
                self.records[slot][word] = *value;
                self.stage(record_at(slot) + 8 * word, *value);
            }
        }
    }

    /// Makes true what is staged: all of it, or nothing if the process is killed before.
    ///
    /// # Panics
    ///
    /// Panics if there is more than the log holds: no step of a connection stages as much.
    pub fn commit(&mut self) {
        let staged = std::mem::take(&mut self.staged);
        // The largest transaction is a record, a reset and the header.
        assert!(staged.len() <= LOG_MAX, "a transaction of {} stores", staged.len());
        if let [(at, value)] = staged[..] {
            self.store(at, value);
        } else if !staged.is_empty() {
            for (entry, (at, value)) in staged.iter().enumerate() {
                self.store(LOG + 8 + 16 * entry, *at as u64);
                self.store(LOG + 16 + 16 * entry, *value);
            }
            self.store(LOG, staged.len() as u64);
            for (at, value) in &staged {
                self.store(*at, *value);
            }
            self.store(LOG, 0);
        }
        self.staged = staged;
        self.staged.clear();
    }

    /// A piece of a connection's area.
    ///
    /// # Panics
    ///
    /// Panics if the piece is not in the area.
    #[must_use]
    pub fn area(&self, slot: usize, piece: &Range<usize>) -> VolatileSlice<'_> {
        let area = self.state.slice().subslice(AREAS + slot * AREA_BYTES, AREA_BYTES);
        let piece = area.and_then(|area| area.subslice(piece.start, piece.len()));
        piece.expect(IN_BOUNDS)
    }

    /// Gives the memory of a connection's area back: nothing in it means anything any more.
    pub fn forget_area(&self, slot: usize) {
        if let Err(error) = sys::punch(&self.area(slot, &(0..AREA_BYTES))) {
            log::debug!("cannot give memory back: {error}");
        }
    }

    fn begin(&self, cid: Cid) {
        self.store(LOG, 0);
        for word in 0..WORDS {
            let value = if word == Word::Cid as usize { cid.0 } else { 0 };
            self.store(HEADER + 8 * word, value);
        }
        self.store(8, SHAPE);
        self.store(0, VERSION);
    }

    /// Copies a whole log into place.
    fn redo(&self) -> Result<(), LedgerError> {
        let count = usize::try_from(self.load(LOG)).unwrap_or(usize::MAX);
        if count > LOG_MAX {
            return Err(LedgerError::Nonsense("its log is too long"));
        }
        let entries = (0..count).map(|entry| {
            let at = usize::try_from(self.load(LOG + 8 + 16 * entry)).unwrap_or(usize::MAX);
            let known = (HEADER..LOG).contains(&at) || (RESETS..AREAS).contains(&at);
            (known && at % 8 == 0).then(|| (at, self.load(LOG + 16 + 16 * entry)))
        });
        let entries: Option<Vec<_>> = entries.collect();
        for (at, value) in entries.ok_or(LedgerError::Nonsense("its log leads outside"))? {
            self.store(at, value);
        }
        if count > 0 {
            self.store(LOG, 0);
        }
        Ok(())
    }

    fn stage(&mut self, at: usize, value: u64) {
        match self.staged.iter_mut().find(|(staged, _value)| *staged == at) {
            Some((_at, staged)) => *staged = value,
            None => self.staged.push((at, value)),
        }
    }

    fn load(&self, at: usize) -> u64 {
        self.state.slice().load(at, Ordering::Acquire).expect(IN_BOUNDS)
    }

    /// A release store: a process that is killed stops between two instructions, and what it has
    /// stored stays, so it is the compiler and the processor that must keep the order.
    fn store(&self, at: usize, value: u64) {
        self.state.slice().store(value, at, Ordering::Release).expect(IN_BOUNDS);
        death::reach();
    }
}

fn record_at(slot: usize) -> usize {
    RECORDS + RECORD_STRIDE * slot
}

/// Memory as a supervisor gives it.
fn memory() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("connections", flags)?);
    file.set_len(STATE_BYTES as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
pub(crate) mod tests;
