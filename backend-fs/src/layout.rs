//! Where everything stands in the ledger: the session, a record for each queue, handles, nodes.

use std::ffi::{CStr, CString};

use crate::ledger::{AT_FREE, BODY, Writes};

/// How much state the supervisor keeps for a share, in bytes. It is memory only as far as it is
/// used: 320 bytes a node that the guest knows.
pub const STATE_BYTES: usize = 256 << 20;

/// From which slot on no node was ever put, in this session.
pub(crate) const AT_NODES_END: usize = AT_FREE;
/// The same of handles.
pub(crate) const AT_HANDLES_END: usize = AT_FREE + 1;
/// What the next node or handle has in its upper bits.
pub(crate) const AT_SERIAL: usize = AT_FREE + 2;
/// The length of the mount's INIT arguments, in bytes; zero if nothing is mounted.
pub(crate) const AT_INIT_BYTES: usize = AT_FREE + 3;
/// The arguments.
pub(crate) const AT_INIT: usize = AT_FREE + 4;
/// The most words of them: `struct fuse_init_in` has eight.
pub(crate) const INIT_WORDS: usize = 8;

/// Records there are: a device has a queue for urgent requests and 64 others at most.
pub(crate) const RECORDS: usize = 65;
const RECORD_WORDS: usize = 128;
const RECORDS_AT: usize = BODY;

/// Handles there may be.
const HANDLES: usize = 1 << 16;
const HANDLE_WORDS: usize = 4;
const HANDLES_AT: usize = RECORDS_AT + RECORDS * RECORD_WORDS;

const NODE_WORDS: usize = 40;
const NODES_AT: usize = HANDLES_AT + HANDLES * HANDLE_WORDS;
/// An id holds a slot in its lower bits.
const SLOT_BITS: u32 = 20;

/// The longest name of a file, in bytes (`NAME_MAX`).
pub(crate) const NAME_BYTES: usize = 255;
/// The words of the longest name.
pub(crate) const NAME_WORDS: usize = 32;

/// Where the record of a queue is.
pub(crate) fn record(queue: usize) -> usize {
    assert!(queue < RECORDS, "the device has no queue {queue}");
    RECORDS_AT + queue * RECORD_WORDS
}

/// Where the handle in a slot is.
pub(crate) fn handle(slot: usize) -> usize {
    HANDLES_AT + slot * HANDLE_WORDS
}

/// Where the node in a slot is.
pub(crate) fn node(slot: usize) -> usize {
    NODES_AT + slot * NODE_WORDS
}

/// How many handles a ledger of so many words has room for.
pub(crate) fn handle_slots(words: usize) -> usize {
    if words > NODES_AT { HANDLES } else { 0 }
}

/// How many nodes a ledger of so many words has room for.
pub(crate) fn node_slots(words: usize) -> usize {
    (words.saturating_sub(NODES_AT) / NODE_WORDS).min(1 << SLOT_BITS)
}

/// The id of what is in a slot: no other one ever has it.
pub(crate) fn id(serial: u64, slot: usize) -> u64 {
    serial << SLOT_BITS | slot as u64
}

/// The slot of an id.
pub(crate) fn slot(id: u64) -> usize {
    usize::try_from(id & ((1 << SLOT_BITS) - 1)).unwrap_or(0)
}

/// Writes a name at a place; only as many words as it has.
pub(crate) fn write_name(place: usize, name: &CStr, writes: &mut Writes) {
    for (index, part) in name.to_bytes().chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        writes.push((place + index, u64::from_le_bytes(word)));
    }
}

/// Reads a name of so many bytes; nothing if it is none.
pub(crate) fn read_name(
    place: usize,
    len_bytes: u64,
    load: impl Fn(usize) -> u64,
) -> Option<CString> {
    let len = usize::try_from(len_bytes).ok().filter(|len| (1..=NAME_BYTES).contains(len))?;
    let mut bytes: Vec<u8> =
        (0..len.div_ceil(8)).flat_map(|index| load(place + index).to_le_bytes()).collect();
    bytes.truncate(len);
    CString::new(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_do_not_overlap_and_there_is_room_for_hundreds_of_thousands_of_nodes() {
        const { assert!(AT_INIT + INIT_WORDS <= 64) };
        assert_eq!(record(RECORDS - 1) + RECORD_WORDS, handle(0));
        assert_eq!(handle(HANDLES), node(0));
        let slots = node_slots(STATE_BYTES / 8);
        assert!(slots > 800_000 && node(slots) <= STATE_BYTES / 8);
        assert_eq!((node_slots(0), handle_slots(100)), (0, 0));
    }

    #[test]
    fn an_id_names_its_slot_and_the_root_has_the_id_that_fuse_gives_it() {
        assert_eq!(id(0, 1), 1);
        assert_eq!(slot(id(12_345, 678)), 678);
    }

    #[test]
    fn names_come_back_as_they_were_written() {
        for name in ["a", "eight888", "\u{fe}and more than eight", &"x".repeat(255)] {
            let name = CString::new(name).unwrap();
            let mut writes = Writes::new();
            write_name(5, &name, &mut writes);
            let load = |place| writes.iter().find(|(at, _)| *at == place).unwrap().1;
            assert_eq!(read_name(5, name.as_bytes().len() as u64, load), Some(name));
        }
        assert_eq!(read_name(0, 0, |_| 1), None);
        assert_eq!(read_name(0, 256, |_| 1), None);
        assert_eq!(read_name(0, 8, |_| 0), None);
    }
}
