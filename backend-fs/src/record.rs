//! What is known of the request that a queue serves, for a successor that has to serve it again.
//!
//! A queue serves one request at a time, so each has one record:
//!
//! ```text
//!   nothing --> begun --------> done        begun: what is about to change, and what was before
//!      |          | (a successor looks)     done: the answer is in the guest's memory
//!      |          `--> carried --> done     carried: it has changed, the answer is missing
//!      `------> part --> done               part: so many of its changes have been made
//! ```

use std::ffi::{CStr, CString};

use crate::layout::{self, NAME_WORDS};
use crate::ledger::{Ledger, Writes};

const STATE: usize = 0;
const UNIQUE: usize = 1;
const HEAD: usize = 2;
/// The answer's length, or how many changes were made.
const VALUE: usize = 3;
const KIND: usize = 4;
/// Six words, by kind.
const FACTS: usize = 5;
/// The lengths of both names.
const LENGTHS: usize = 11;
const NAME: usize = 12;
const NEW_NAME: usize = NAME + NAME_WORDS;

const BEGUN: u64 = 1;
const CARRIED: u64 = 2;
const DONE: u64 = 3;
const PART: u64 = 4;

/// A name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    /// The folder's node.
    pub(crate) parent: u64,
    /// The name.
    pub(crate) name: CString,
}

impl Spot {
    pub(crate) fn new(parent: u64, name: &CStr) -> Self {
        Self { parent, name: name.to_owned() }
    }
}

/// What a request is about to change that it must not change twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    /// A name that was free is about to be taken: by the inode of this number, or by a new one.
    Make { spot: Spot, inode: Option<u64> },
    /// The name of an inode is about to go; the guest knows it as this node.
    Remove { spot: Spot, inode: u64, node: Option<u64> },
    /// An inode is about to get another name.
    Move(Move),
    /// Bytes are about to be written at the end of a file of this size.
    Append { size_bytes: u64 },
    /// An extended attribute is about to be set or removed that was there or not.
    Attribute { existed: bool },
}

/// A change of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) from: Spot,
    pub(crate) to: Spot,
    /// The inode's number, and its node if the guest knows it.
    pub(crate) inode: u64,
    pub(crate) node: Option<u64>,
    /// The same of what had the new name before.
    pub(crate) target: Option<(u64, Option<u64>)>,
    /// Both exchange their names.
    pub(crate) exchanges: bool,
}

/// Which request a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) unique: u64,
    pub(crate) head: u16,
}

/// How far a request got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Begun(Intent),
    Carried(Intent),
    Done { written_bytes: u32 },
    Part { changes: usize },
}

/// Writes a record.
pub(crate) fn write(queue: usize, key: Key, stage: &Stage, writes: &mut Writes) {
    let place = layout::record(queue);
    let (state, value) = match stage {
        Stage::Begun(intent) => {
            write_intent(place, intent, writes);
            (BEGUN, 0)
        }
        Stage::Carried(intent) => {
            write_intent(place, intent, writes);
            (CARRIED, 0)
        }
        Stage::Done { written_bytes } => (DONE, u64::from(*written_bytes)),
        Stage::Part { changes } => (PART, *changes as u64),
    };
    writes.extend([
        (place + STATE, state),
        (place + UNIQUE, key.unique),
        (place + HEAD, u64::from(key.head)),
        (place + VALUE, value),
    ]);
}

/// Takes a record back: its request has changed nothing.
pub(crate) fn erase(queue: usize, writes: &mut Writes) {
    writes.push((layout::record(queue) + STATE, 0));
}

/// The record of a queue; nothing if there is none, or it makes no sense.
pub(crate) fn read(queue: usize, ledger: &Ledger) -> Option<(Key, Stage)> {
    let place = layout::record(queue);
    let load = |at: usize| ledger.load(place + at);
    let stage = match load(STATE) {
        BEGUN => Stage::Begun(read_intent(place, ledger)?),
        CARRIED => Stage::Carried(read_intent(place, ledger)?),
        DONE => Stage::Done { written_bytes: u32::try_from(load(VALUE)).ok()? },
        PART => Stage::Part { changes: usize::try_from(load(VALUE)).ok()? },
        _ => return None,
    };
    Some((Key { unique: load(UNIQUE), head: u16::try_from(load(HEAD)).ok()? }, stage))
}

/// A node in a word; ids are never zero.
fn word(id: Option<u64>) -> u64 {
    id.unwrap_or(0)
}

fn optional(word: u64) -> Option<u64> {
    Some(word).filter(|word| *word != 0)
}

fn write_intent(place: usize, intent: &Intent, writes: &mut Writes) {
    let (kind, facts, names): (u64, [u64; 6], [Option<&CStr>; 2]) = match intent {
        Intent::Make { spot, inode } => {
            (1, [spot.parent, word(*inode), 0, 0, 0, 0], [Some(&spot.name), None])
        }
        Intent::Remove { spot, inode, node } => {
            (2, [spot.parent, *inode, word(*node), 0, 0, 0], [Some(&spot.name), None])
        }
        Intent::Move(change) => {
            let kind = if change.exchanges { 4 } else { 3 };
            let (inode, node) = change.target.map_or((0, None), |target| target);
            let sides = (change.from.parent, change.to.parent);
            let facts = [sides.0, sides.1, change.inode, word(change.node), inode, word(node)];
            (kind, facts, [Some(&change.from.name), Some(&change.to.name)])
        }
        Intent::Append { size_bytes } => (5, [*size_bytes, 0, 0, 0, 0, 0], [None, None]),
        Intent::Attribute { existed } => (6, [u64::from(*existed), 0, 0, 0, 0, 0], [None, None]),
    };
    writes.push((place + KIND, kind));
    writes.extend(facts.iter().enumerate().map(|(index, fact)| (place + FACTS + index, *fact)));
    let mut lengths = 0;
    for (index, (name, at)) in names.into_iter().zip([NAME, NEW_NAME]).enumerate() {
        let Some(name) = name else { continue };
        lengths |= (name.to_bytes().len() as u64) << (32 * index);
        layout::write_name(place + at, name, writes);
    }
    writes.push((place + LENGTHS, lengths));
}

fn read_intent(place: usize, ledger: &Ledger) -> Option<Intent> {
    let fact = |index: usize| ledger.load(place + FACTS + index);
    let lengths = ledger.load(place + LENGTHS);
    let load = |at| ledger.load(at);
    let name = || layout::read_name(place + NAME, lengths & 0xffff_ffff, load);
    let new_name = || layout::read_name(place + NEW_NAME, lengths >> 32, load);
    let spot = || Some(Spot { parent: fact(0), name: name()? });
    Some(match ledger.load(place + KIND) {
        1 => Intent::Make { spot: spot()?, inode: optional(fact(1)) },
        2 => Intent::Remove { spot: spot()?, inode: fact(1), node: optional(fact(2)) },
        kind @ (3 | 4) => Intent::Move(Move {
            from: spot()?,
            to: Spot { parent: fact(1), name: new_name()? },
            inode: fact(2),
            node: optional(fact(3)),
            target: optional(fact(4)).map(|inode| (inode, optional(fact(5)))),
            exchanges: kind == 4,
        }),
        5 => Intent::Append { size_bytes: fact(0) },
        6 => Intent::Attribute { existed: fact(0) != 0 },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::fault;

    fn spot(parent: u64, name: &str) -> Spot {
        Spot { parent, name: CString::new(name).unwrap() }
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let ledger = Ledger::open(fault::state(layout::node(4) * 8)).unwrap();
        let (long, short) = ("n".repeat(255), "s");
        let change = |target, exchanges| {
            let (from, to) = (spot(1, &long), spot(7, short));
            Intent::Move(Move { from, to, inode: 3, node: Some(9), target, exchanges })
        };
        let intents = [
            Intent::Make { spot: spot(1, short), inode: None },
            Intent::Make { spot: spot(1, &long), inode: Some(5) },
            Intent::Remove { spot: spot(1, short), inode: 4, node: None },
            Intent::Remove { spot: spot(1, &long), inode: 4, node: Some(11) },
            change(None, false),
            change(Some((8, None)), false),
            change(Some((8, Some(10))), true),
            Intent::Append { size_bytes: 1 << 40 },
            Intent::Attribute { existed: true },
        ];
        let stages = intents
            .iter()
            .flat_map(|intent| [Stage::Begun(intent.clone()), Stage::Carried(intent.clone())]);
        let others = [Stage::Done { written_bytes: 160 }, Stage::Part { changes: 12 }];
        for (stage, queue) in stages.chain(others).zip((0..3).cycle()) {
            let key = Key { unique: 1 << 50, head: 1023 };
            let mut writes = Writes::new();
            write(queue, key, &stage, &mut writes);
            ledger.commit(&writes);
            assert_eq!(read(queue, &ledger), Some((key, stage)));
            writes.clear();
            erase(queue, &mut writes);
            ledger.commit(&writes);
            assert_eq!(read(queue, &ledger), None);
        }
    }
}
