//! Bytes of the guest that the host program has not taken yet: where they are, not what they are.
//!
//! They lie in the connection's area of the ledger, a ring of [`AREA_BYTES`]. The guest's credit
//! bounds them; before them there may be what remains of the greeting, which costs no credit.

use std::ops::Range;

use crate::ledger::{AREA_BYTES, AREA_LEN as SIZE};

/// A queue of bytes on their way to one host program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outbox {
    /// Where the first byte is.
    at: u32,
    len: u32,
    /// How many of the first bytes are the greeting's.
    greeting: u32,
}

impl Outbox {
    /// One as it was written down, if it makes sense.
    #[must_use]
    pub fn restore(at: u32, len: u32, greeting: u32) -> Option<Self> {
        (at < SIZE && len <= SIZE && greeting <= len).then_some(Self { at, len, greeting })
    }

    /// To be written down: its place, its length and the greeting's.
    #[must_use]
    pub fn parts(&self) -> (u32, u32, u32) {
        (self.at, self.len, self.greeting)
    }

    /// Whether everything was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes wait.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Where `len` bytes go that come next; nothing if there is no room for them.
    #[must_use]
    pub fn room(&self, len: u32) -> Option<[Range<usize>; 2]> {
        (len <= SIZE - self.len).then(|| ring(self.at + self.len, len))
    }

    /// Takes note of bytes of the guest that were put where [`room`](Self::room) said.
    pub fn push(&mut self, len: u32) {
        debug_assert!(len <= SIZE - self.len, "there is no room for this");
        self.len += len;
    }

    /// Takes note of the greeting, likewise.
    pub fn greet(&mut self, len: u32) {
        debug_assert!(self.len == self.greeting, "the greeting comes before the guest's bytes");
        self.push(len);
        self.greeting += len;
    }

    /// Where the first bytes are, at most so many.
    #[must_use]
    pub fn first(&self, most: u32) -> [Range<usize>; 2] {
        ring(self.at, self.len.min(most))
    }

    /// Takes note that so many bytes were taken. Says how many of them were the guest's.
    pub fn take(&mut self, len: u32) -> u32 {
        debug_assert!(len <= self.len, "more was taken than there is");
        let greeting = self.greeting.min(len);
        self.greeting -= greeting;
        self.len -= len;
        // An empty one starts again where it began: it touches no more memory than it needs.
        self.at = if self.len == 0 { 0 } else { (self.at + len) % SIZE };
        len - greeting
    }

    /// Forgets all bytes: nobody wants them. Says how many were the guest's.
    pub fn clear(&mut self) -> u32 {
        self.take(self.len)
    }
}

/// The one or two pieces of the ring that `len` bytes from `at` on are in.
fn ring(at: u32, len: u32) -> [Range<usize>; 2] {
    let at = at as usize % AREA_BYTES;
    let first = (len as usize).min(AREA_BYTES - at);
    [at..at + first, 0..len as usize - first]
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_greeting_comes_first_and_costs_no_credit() {
        let mut outbox = Outbox::default();
        outbox.greet(10);
        outbox.push(100);
        assert_eq!(outbox.first(u32::MAX), [0..110, 0..0]);
        assert_eq!(outbox.take(4), 0);
        assert_eq!(outbox.take(16), 10);
        assert_eq!(outbox.clear(), 90);
        assert_eq!(outbox, Outbox::default());
    }

    proptest! {
        #[test]
        fn bytes_come_out_once_and_in_order(
            steps in prop::collection::vec((0_u32..=SIZE, 0_u32..=SIZE), 1..60),
        ) {
            let mut area = vec![0_u8; AREA_BYTES];
            let mut outbox = Outbox::default();
            let mut model = VecDeque::new();
            let mut next = 0_u8;
            for (push, take) in steps {
                if let Some(pieces) = outbox.room(push) {
                    for at in pieces.into_iter().flatten() {
                        area[at] = next;
                        model.push_back(next);
                        next = next.wrapping_add(1);
                    }
                    outbox.push(push);
                }
                prop_assert_eq!(outbox.room(SIZE - outbox.len() + 1), None);
                let taken: Vec<usize> = outbox.first(take).into_iter().flatten().collect();
                for at in &taken {
                    prop_assert_eq!(Some(area[*at]), model.pop_front());
                }
                outbox.take(u32::try_from(taken.len()).unwrap());
                prop_assert_eq!(outbox.len() as usize, model.len());
                let (at, len, greeting) = outbox.parts();
                prop_assert_eq!(Outbox::restore(at, len, greeting), Some(outbox));
            }
        }

        #[test]
        fn what_makes_no_sense_is_not_restored(at: u32, len: u32, greeting: u32) {
            if let Some(mut outbox) = Outbox::restore(at, len, greeting) {
                prop_assert!(outbox.first(u32::MAX).into_iter().all(|it| it.end <= AREA_BYTES));
                outbox.clear();
            }
        }
    }
}
