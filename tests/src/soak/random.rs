//! Numbers that look random and are the same for the same seed.

/// A generator (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The generator of one round of one seed: a round depends on no other.
    #[must_use]
    pub(super) fn of_round(seed: u64, round: u64) -> Self {
        let mut mixed = Self(seed);
        Self(mixed.next() ^ round.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `end`, which is not 0.
    ///
    /// # Panics
    ///
    /// Panics if `end` is 0.
    pub(super) fn below(&mut self, end: u32) -> u32 {
        assert!(end > 0, "no number is below 0");
        // So many of the word's bits fit.
        u32::try_from(self.next() % u64::from(end)).unwrap_or(0)
    }

    /// One of them; none of nothing.
    pub(super) fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        let end = u32::try_from(all.len()).ok().filter(|end| *end > 0)?;
        all.get(usize::try_from(self.below(end)).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_of_a_seed_is_always_the_same_and_differs_from_others() {
        let numbers = |seed, round| {
            let mut random = Random::of_round(seed, round);
            (0..20).map(|_| random.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(numbers(1, 2), numbers(1, 2));
        assert_ne!(numbers(1, 2), numbers(1, 3));
        assert_ne!(numbers(1, 2), numbers(2, 2));
    }

    #[test]
    fn each_is_chosen_at_some_time_and_nothing_of_nothing() {
        let mut random = Random::of_round(7, 0);
        let mut seen = [false; 4];
        for _ in 0..200 {
            seen[*random.one_of(&[0_usize, 1, 2, 3]).unwrap()] = true;
        }
        assert_eq!(seen, [true; 4]);
        assert_eq!(random.one_of::<u8>(&[]), None);
    }
}
