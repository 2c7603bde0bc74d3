//! One queue's part of the region: which of its chains are in flight, and in what order.
//!
//! The order of the stores is the specification's, and what makes it safe to die between any two
//! of them. They are release stores: a process that is killed stops between two instructions, and
//! what it has stored stays, so it is the compiler and the processor that must keep the order.

#[cfg(test)]
pub(crate) mod fault;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use super::{ENTRY_BYTES, HEADER_BYTES, InflightError};

const FEATURES: usize = 0;
const VERSION: usize = 8;
const COUNT: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;

/// Within an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The one version there is; zero means that nothing was written yet.
const CURRENT: u16 = 1;

/// Between which stores a process may die.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// A new part has its header, but not yet its version.
    Begun,
    /// A chain's counter is stored.
    Counted,
    /// A chain is marked.
    Marked,
    /// A mark was taken away, as the chain was put back.
    Unmarked,
    /// A used chain points to the one before.
    Linked,
    /// The list of used chains begins with it.
    Listed,
    /// The used ring's elements are written.
    Written,
    /// The used index is stored.
    Published,
    /// A used chain's mark is taken away.
    Cleared,
    /// The part's own used index is stored.
    Settled,
    /// A successor took a mark away that was left over.
    Repaired,
}

/// Does nothing but in tests, where the process may be made to die here.
pub(crate) fn reach(step: Step) {
    #[cfg(test)]
    fault::reach(step);
    crate::fault::pass(&step);
}

/// A queue's part of the region, in the hands of the one that serves the queue.
#[derive(Debug)]
pub(crate) struct Log {
    mapping: Arc<MmapRegion<()>>,
    /// In `mapping`; the part lies in it whole.
    start: usize,
    size: u16,
    /// Of the next chain.
    counter: u64,
    /// Chains of a predecessor, in the order in which it took them: to be served first.
    waiting: VecDeque<u16>,
}

impl Log {
    pub(super) fn new(mapping: Arc<MmapRegion<()>>, start: usize, size: u16) -> Self {
        Self { mapping, start, size, counter: 0, waiting: VecDeque::new() }
    }

    /// How many entries the part was made with; zero if nobody wrote it down.
    pub(super) fn entries(&self) -> u16 {
        self.load(COUNT)
    }

    /// Writes down how many entries the part has; it stays empty.
    pub(super) fn declare(&self) {
        self.store(COUNT, self.size);
    }

    /// Whether the part can be read: it is empty, or of the version and shape that are known.
    pub(super) fn check(&self, queue: u16) -> Result<(), InflightError> {
        let version: u16 = self.load(VERSION);
        match version {
            0 => Ok(()),
            CURRENT => {
                let (features, count) = (self.load(FEATURES), self.load(COUNT));
                if features == 0 && count == self.size {
                    return Ok(());
                }
                Err(InflightError::Header { queue, features, count, size: self.size })
            }
            version => Err(InflightError::Version { queue, version }),
        }
    }

    /// Takes the part up for a ring whose used index is `used`, and gives how many chains a
    /// predecessor left in flight; nothing if there was none.
    pub(crate) fn recover(&mut self, used: u16) -> Option<u16> {
        if self.load::<u16>(VERSION) != CURRENT {
            self.begin(used);
            return None;
        }
        let batch = used.wrapping_sub(self.load(USED_INDEX));
        if batch > self.size {
            // No batch is as large: the guest has started its ring anew, and nothing is left.
            self.begin(used);
            return None;
        }
        let mut head: u16 = self.load(LAST_BATCH_HEAD);
        for _ in 0..batch {
            if head >= self.size {
                break;
            }
            self.store(self.entry(head) + INFLIGHT, 0_u8);
            reach(Step::Repaired);
            head = self.load(self.entry(head) + NEXT);
        }
        self.store(USED_INDEX, used);
        reach(Step::Settled);
        let mut marked: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.load::<u8>(self.entry(*head) + INFLIGHT) != 0)
            .map(|head| (self.load(self.entry(head) + COUNTER), head))
            .collect();
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |(counter, _head)| counter.wrapping_add(1));
        self.waiting = marked.into_iter().map(|(_counter, head)| head).collect();
        u16::try_from(self.waiting.len()).ok()
    }

    /// The next chain that a predecessor left.
    pub(crate) fn take_waiting(&mut self) -> Option<u16> {
        self.waiting.pop_front()
    }

    /// Puts one back that `take_waiting` gave: it stays marked.
    pub(crate) fn wait_again(&mut self, head: u16) {
        self.waiting.push_front(head);
    }

    /// What a predecessor left and nobody has taken yet.
    pub(crate) fn waiting(&self) -> impl ExactSizeIterator<Item = u16> + '_ {
        self.waiting.iter().copied()
    }

    /// Forgets that chains wait: they are back in the available ring.
    pub(crate) fn release_waiting(&mut self) {
        // The last one first: what is left at any time is what the available ring begins with.
        while let Some(head) = self.waiting.pop_back() {
            self.unmark(head);
        }
    }

    /// Marks a chain that was taken from the available ring. Before the device acts on it.
    pub(crate) fn mark(&mut self, head: u16) {
        if head >= self.size {
            return;
        }
        let entry = self.entry(head);
        self.store(entry + COUNTER, self.counter);
        reach(Step::Counted);
        self.counter = self.counter.wrapping_add(1);
        self.store(entry + INFLIGHT, 1_u8);
        reach(Step::Marked);
    }

    /// Takes the mark of a chain away that is back in the available ring.
    pub(crate) fn unmark(&self, head: u16) {
        if head < self.size {
            self.store(self.entry(head) + INFLIGHT, 0_u8);
            reach(Step::Unmarked);
        }
    }

    /// Adds a chain to those that the next used index publishes. Before that index is stored.
    pub(crate) fn link(&self, head: u16) {
        if head < self.size {
            let before: u16 = self.load(LAST_BATCH_HEAD);
            self.store(self.entry(head) + NEXT, before);
            reach(Step::Linked);
            self.store(LAST_BATCH_HEAD, head);
            reach(Step::Listed);
        }
    }

    /// Takes the marks of published chains away, now that the used index is `used`.
    pub(crate) fn settle(&self, heads: impl IntoIterator<Item = u16>, used: u16) {
        reach(Step::Published);
        for head in heads.into_iter().filter(|head| *head < self.size) {
            self.store(self.entry(head) + INFLIGHT, 0_u8);
            reach(Step::Cleared);
        }
        self.store(USED_INDEX, used);
        reach(Step::Settled);
    }

    /// Makes the part as good as new.
    pub(super) fn wipe(&self) {
        self.store(VERSION, 0_u16);
        self.clear();
    }

    fn begin(&self, used: u16) {
        self.store(VERSION, 0_u16);
        self.clear();
        self.store(FEATURES, 0_u64);
        self.store(COUNT, self.size);
        self.store(LAST_BATCH_HEAD, 0_u16);
        self.store(USED_INDEX, used);
        reach(Step::Begun);
        self.store(VERSION, CURRENT);
    }

    fn clear(&self) {
        for head in 0..self.size {
            self.store(self.entry(head) + INFLIGHT, 0_u8);
        }
    }

    fn entry(&self, head: u16) -> usize {
        HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> T {
        let value = self.mapping.as_volatile_slice().load(self.start + at, Ordering::Acquire);
        value.expect("the part was checked to lie in the mapping, and each field is aligned")
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let slice = self.mapping.as_volatile_slice();
        let stored = slice.store(value, self.start + at, Ordering::Release);
        stored.expect("the part was checked to lie in the mapping, and each field is aligned");
    }
}
