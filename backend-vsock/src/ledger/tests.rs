//! Dying after each store of a transaction, and memory that is not what it should be.

use proptest::prelude::*;

use super::*;
use crate::packet::{Header, Op, TYPE_STREAM};

const CID: Cid = Cid(52);

pub(crate) fn fresh() -> State {
    State::map(memory().unwrap()).unwrap()
}

/// Puts a value where the header, the log, a reset or the first records are.
pub(crate) fn scribble(state: &State, at: prop::sample::Index, value: u64) {
    let records = RECORDS / 8 + 8 * RECORD_STRIDE / 8;
    let at = match at.index(2 * records) {
        at if at < records => 8 * at,
        // Where it hurts more often.
        at => 8 * (at % (HEADER / 8 + WORDS)),
    };
    state.slice().store(value, at, Ordering::Release).unwrap();
}

fn open(state: &State) -> Ledger {
    Ledger::open(state.clone(), CID).unwrap()
}

fn reset(number: u32) -> Header {
    Header {
        src_cid: Cid(2),
        dst_cid: CID,
        src_port: number,
        dst_port: number + 1,
        len_bytes: 0,
        kind: TYPE_STREAM,
        op: Op::Reset.number(),
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}

/// One thing that a transaction changes.
#[derive(Clone, Copy, Debug)]
enum Change {
    Word(u64),
    Record(usize, u64),
    Owe(u32),
    Sent,
}

fn change(ledger: &mut Ledger, change: Change) {
    match change {
        Change::Word(value) => ledger.set(Word::TxDone, value),
        Change::Record(slot, value) => {
            let mut record = *ledger.record(slot);
            record[usize::try_from(value % RECORD_WORDS as u64).unwrap()] = value;
            record[0] |= 1;
            ledger.set_record(slot, &record);
        }
        Change::Owe(number) => ledger.owe_reset(&reset(number)),
        Change::Sent if ledger.resets() > 0 => ledger.reset_sent(),
        Change::Sent => {}
    }
}

/// All that a successor sees.
fn seen(ledger: &Ledger) -> (Vec<u64>, Vec<Record>, Option<Header>) {
    (ledger.words.to_vec(), ledger.records.clone(), ledger.oldest_reset())
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let one = prop_oneof![
        any::<u64>().prop_map(Change::Word),
        (0..3_usize, any::<u64>()).prop_map(|(slot, value)| Change::Record(slot, value)),
        (0..1000_u32).prop_map(Change::Owe),
        Just(Change::Sent),
    ];
    prop::collection::vec(one, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// Whatever the transactions and wherever the process dies, a successor that may die in the
    /// same way sees a transaction whole or not at all.
    #[test]
    fn a_transaction_is_seen_whole_or_not_at_all(
        before in prop::collection::vec(changes(), 0..4),
        last in changes(),
        second_death in 0_usize..30,
    ) {
        let state = fresh();
        for transaction in before {
            let mut ledger = open(&state);
            transaction.into_iter().for_each(|it| change(&mut ledger, it));
            ledger.commit();
        }
        for death in 0.. {
            let mut ledger = open(&state);
            let old = seen(&ledger);
            let lived = death::after(death, || {
                last.iter().for_each(|it| change(&mut ledger, *it));
                ledger.commit();
            });
            let new = seen(&ledger);
            death::after(second_death, || open(&state));
            let found = seen(&open(&state));
            prop_assert!(found.0 == old.0 && found.1 == old.1 || found.0 == new.0 && found.1 == new.1);
            if lived.is_some() {
                prop_assert_eq!(found, new);
                break;
            }
        }
    }
}

#[test]
fn a_ledger_that_dies_while_it_begins_begins_again() {
    for death in 0.. {
        let state = fresh();
        let lived = death::after(death, || open(&state)).is_some();
        let ledger = open(&state);
        assert_eq!(ledger.get(Word::Cid), CID.0);
        assert_eq!(ledger.resets(), 0);
        if lived {
            break;
        }
    }
}

#[test]
fn resets_are_kept_in_their_order_and_no_more_than_there_is_room_for() {
    let state = fresh();
    for number in 0..u32::try_from(RESETS_MAX).unwrap() + 10 {
        let mut ledger = open(&state);
        ledger.owe_reset(&reset(number));
        ledger.commit();
    }
    let mut ledger = open(&state);
    assert_eq!(ledger.resets(), RESETS_MAX);
    for number in 0..u32::try_from(RESETS_MAX).unwrap() {
        assert_eq!(ledger.oldest_reset(), Some(reset(number)));
        ledger.reset_sent();
        ledger.commit();
    }
    assert_eq!(ledger.oldest_reset(), None);
}

#[test]
fn what_can_t_be_read_is_refused_and_left_as_it_is() {
    let state = fresh();
    open(&state);
    assert!(matches!(Ledger::open(state.clone(), Cid(53)), Err(LedgerError::OtherGuest(52))));
    let put = |at, value: u64| state.slice().store(value, at, Ordering::Release).unwrap();
    let refused = |at, value| {
        let old: u64 = state.slice().load(at, Ordering::Acquire).unwrap();
        put(at, value);
        let error = Ledger::open(state.clone(), CID).unwrap_err();
        assert_eq!(state.slice().load::<u64>(at, Ordering::Acquire).unwrap(), value);
        put(at, old);
        error
    };
    assert!(matches!(refused(0, 2), LedgerError::Version(2)));
    assert!(matches!(refused(8, 1), LedgerError::Shape));
    assert!(matches!(refused(LOG, 65), LedgerError::Nonsense(_)));
    for outside in [0, 8, HEADER as u64 + 1, LOG as u64, AREAS as u64, u64::MAX] {
        put(LOG + 8, outside);
        assert!(matches!(refused(LOG, 1), LedgerError::Nonsense(_)), "{outside}");
    }
    let owed = HEADER + 8 * Word::ResetsOwed as usize;
    assert!(matches!(refused(owed, 257), LedgerError::Nonsense(_)));
    open(&state);
    let small = memfd_create("small", MemfdFlags::ALLOW_SEALING).map(File::from).unwrap();
    small.set_len(4096).unwrap();
    fcntl_add_seals(&small, SealFlags::SHRINK).unwrap();
    let small = Ledger::open(State::map(small).unwrap(), CID);
    assert!(matches!(small, Err(LedgerError::TooSmall { len_bytes: 4096 })));
}

#[test]
fn an_area_that_is_given_back_is_empty() {
    let state = fresh();
    let ledger = open(&state);
    let area = ledger.area(7, &(0..AREA_BYTES));
    area.copy_from(&[1_u8; AREA_BYTES]);
    ledger.area(8, &(0..1)).copy_from(&[1_u8]);
    ledger.forget_area(7);
    let mut bytes = vec![1_u8; AREA_BYTES];
    area.copy_to(&mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0));
    let mut next = [0_u8];
    ledger.area(8, &(0..1)).copy_to(&mut next);
    assert_eq!(next, [1]);
}
