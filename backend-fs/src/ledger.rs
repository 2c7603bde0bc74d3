//! Words that outlive the process, and how several of them change at once.
//!
//! The state that the supervisor keeps is an array of 64-bit words. A process that is killed stops
//! between two stores, so a change of several words first goes into a log, which one store makes
//! valid and another one empties:
//!
//! ```text
//!   (place, value) (place, value) ...   count = n   place := value ...   count = 0
//!   \____ the change has not happened ________/ \____ it has happened _________/
//! ```
//!
//! A successor that finds a count carries the log out again, which changes nothing that was done.
//! Only one thread at a time may commit; the owner of the ledger sees to that.

#[cfg(test)]
pub(crate) mod fault;

use std::sync::atomic::Ordering;

use backend_daemon::process::State;
use vm_memory::Bytes;

/// "nacre-fs".
const MAGIC: u64 = u64::from_be_bytes(*b"nacre-fs");
/// Of the layout below.
const VERSION: u64 = 1;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_WORDS: usize = 2;
const AT_LOG_COUNT: usize = 3;
/// What belongs to the rest of the crate: to the session, the records and the tables.
pub(crate) const AT_FREE: usize = 8;
const LOG: usize = 64;
/// The most words of one change.
const LOG_ENTRIES: usize = 512;
/// Where the header and the log end.
pub(crate) const BODY: usize = LOG + 2 * LOG_ENTRIES;

/// Why a predecessor's state can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// There is not room enough.
    #[error("{len_bytes} bytes of state are too few")]
    Small {
        /// What there is.
        len_bytes: usize,
    },
    /// It is something else's.
    #[error("the state is not of nacre-fs")]
    Foreign,
    /// Another release wrote it.
    #[error("the state has version {found}, and this program knows version {VERSION}")]
    Version {
        /// What it says.
        found: u64,
    },
    /// It does not add up.
    #[error("the state is damaged: {what}")]
    Damaged {
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Words to change at once.
pub(crate) type Writes = Vec<(usize, u64)>;

/// The words.
#[derive(Debug)]
pub(crate) struct Ledger {
    state: State,
    words: usize,
}

impl Ledger {
    /// Takes the state up, as it was left or new.
    ///
    /// # Errors
    ///
    /// Fails, and changes nothing, if it is not a state that this program can read.
    pub(crate) fn open(state: State) -> Result<Self, LedgerError> {
        let words = state.len() / 8;
        let ledger = Self { state, words };
        if words <= BODY {
            return Err(LedgerError::Small { len_bytes: ledger.state.len() });
        }
        match (ledger.load(AT_MAGIC), ledger.load(AT_VERSION)) {
            // The magic number comes last, so that a beginning that was cut short begins again.
            (0, 0 | VERSION) => {
                ledger.store(AT_WORDS, words as u64);
                ledger.store(AT_VERSION, VERSION);
                ledger.store(AT_MAGIC, MAGIC);
            }
            (MAGIC, VERSION) => ledger.redo()?,
            (MAGIC, found) => return Err(LedgerError::Version { found }),
            _ => return Err(LedgerError::Foreign),
        }
        Ok(ledger)
    }

    fn redo(&self) -> Result<(), LedgerError> {
        let damaged = |what| LedgerError::Damaged { what };
        if self.load(AT_WORDS) != self.words as u64 {
            return Err(damaged("it had another size"));
        }
        let count = usize::try_from(self.load(AT_LOG_COUNT)).ok();
        let count = count.filter(|count| *count <= LOG_ENTRIES);
        let count = count.ok_or_else(|| damaged("its log is longer than it can be"))?;
        let mut writes = Writes::new();
        for entry in 0..count {
            let place = usize::try_from(self.load(LOG + 2 * entry)).ok();
            let place = place.filter(|place| self.may_change(*place));
            let place = place.ok_or_else(|| damaged("its log names a place that never changes"))?;
            writes.push((place, self.load(LOG + 2 * entry + 1)));
        }
        self.carry_out(&writes);
        Ok(())
    }

    /// The number of words.
    pub(crate) fn words(&self) -> usize {
        self.words
    }

    /// One word.
    pub(crate) fn load(&self, place: usize) -> u64 {
        let value = self.state.slice().load(8 * place, Ordering::Acquire);
        value.expect("every place is computed from the state's own size")
    }

    /// Changes words at once: a successor finds all of them changed, or none.
    pub(crate) fn commit(&self, writes: &[(usize, u64)]) {
        assert!(writes.len() <= LOG_ENTRIES, "a change of {} words is too long", writes.len());
        assert!(writes.iter().all(|(place, _value)| self.may_change(*place)), "outside the body");
        if let [(place, value)] = writes {
            return self.store(*place, *value);
        }
        for (entry, (place, value)) in writes.iter().enumerate() {
            self.store(LOG + 2 * entry, *place as u64);
            self.store(LOG + 2 * entry + 1, *value);
        }
        self.store(AT_LOG_COUNT, writes.len() as u64);
        self.carry_out(writes);
    }

    fn carry_out(&self, writes: &[(usize, u64)]) {
        for (place, value) in writes {
            self.store(*place, *value);
        }
        self.store(AT_LOG_COUNT, 0);
    }

    fn may_change(&self, place: usize) -> bool {
        (AT_FREE..LOG).contains(&place) || (BODY..self.words).contains(&place)
    }

    fn store(&self, place: usize, value: u64) {
        #[cfg(test)]
        if !fault::reach() {
            return;
        }
        let stored = self.state.slice().store(value, 8 * place, Ordering::Release);
        stored.expect("every place is computed from the state's own size");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, any, proptest};
    use proptest::{collection, prop_assert};

    use super::*;

    const BYTES: usize = (BODY + 64) * 8;

    fn image(ledger: &Ledger) -> Vec<u64> {
        (BODY..ledger.words()).map(|place| ledger.load(place)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whichever_store_is_the_last_one_a_change_has_happened_whole_or_not_at_all(
            first in collection::vec((BODY..BODY + 64, any::<u64>()), 0..20),
            second in collection::vec((BODY..BODY + 64, any::<u64>()), 0..20),
        ) {
            for last in 0.. {
                let state = fault::state(BYTES);
                let ledger = Ledger::open(state.clone()).unwrap();
                ledger.commit(&first);
                let before = image(&ledger);
                let died = fault::dies_at(last, || ledger.commit(&second));
                // A successor may die as well while it repairs.
                for again in 0..4 {
                    fault::dies_at(again, || Ledger::open(state.clone()).map(drop).unwrap());
                }
                let now = image(&Ledger::open(state).unwrap());
                let mut after = before.clone();
                for (place, value) in &second {
                    after[place - BODY] = *value;
                }
                prop_assert!(now == before || now == after, "after store {last}");
                if !died {
                    prop_assert!(now == after);
                    break;
                }
            }
        }
    }

    #[test]
    fn a_state_that_can_not_be_read_is_refused_and_left_as_it_is() {
        let changes: [&[(usize, u64)]; 5] = [
            &[(AT_MAGIC, 7)],
            &[(AT_VERSION, 2)],
            &[(AT_WORDS, 1)],
            &[(AT_LOG_COUNT, LOG_ENTRIES as u64 + 1)],
            &[(AT_LOG_COUNT, 1), (LOG, AT_MAGIC as u64)],
        ];
        for change in changes {
            let state = fault::state(BYTES);
            let ledger = Ledger::open(state.clone()).unwrap();
            for (place, value) in change {
                ledger.store(*place, *value);
            }
            let words = || (0..ledger.words()).map(|place| ledger.load(place)).collect::<Vec<_>>();
            let before = words();
            assert!(Ledger::open(state).is_err(), "{change:?}");
            assert_eq!(words(), before);
        }
        assert!(matches!(Ledger::open(fault::state(64)), Err(LedgerError::Small { .. })));
    }

    #[test]
    fn a_beginning_that_was_cut_short_begins_again() {
        for last in 0..3 {
            let state = fault::state(BYTES);
            assert!(fault::dies_at(last, || Ledger::open(state.clone()).map(drop).unwrap()));
            Ledger::open(state).unwrap();
        }
    }
}
