//! Storms: rounds of things that go wrong, for as long as one likes, each with nothing left behind.
//!
//! What a round does follows from the seed and its number alone; when exactly something is killed
//! depends on the machine as well.

mod random;
mod storm;

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::leftovers::Leftovers;
use crate::nacre::User;
use random::Random;
use storm::Storm;

/// What a soak came to.
#[derive(Debug, Default)]
pub struct Soak {
    rounds: u64,
    failed: Vec<u64>,
    kinds: BTreeMap<String, u32>,
}

impl Soak {
    /// Starts rounds until `time` is over, at least one; a line for each on standard output.
    ///
    /// # Errors
    ///
    /// Fails if the host can't be looked at. A round that fails is counted.
    pub fn run(seed: u64, first: u64, time: Duration) -> Result<Self> {
        let end = Instant::now() + time;
        let mut soak = Self::default();
        for round in first.. {
            soak.round(seed, round)?;
            if Instant::now() >= end {
                break;
            }
        }
        Ok(soak)
    }

    fn round(&mut self, seed: u64, round: u64) -> Result<()> {
        let mut random = Random::of_round(seed, round);
        let storm = *random.one_of(&Storm::ALL).context("a kind of round")?;
        // Of its own for each, so that a failed one spoils no other.
        let user = User::new()?;
        let before = Leftovers::now(user.state())?;
        let start = Instant::now();
        let done = storm.run(&user, &mut random);
        let done = done.and_then(|did| before.and_nothing_more(user.state()).map(|()| did));
        let seconds = start.elapsed().as_secs_f64();
        self.rounds += 1;
        *self.kinds.entry(format!("{storm:?}")).or_default() += 1;
        let mut out = stdout().lock();
        match done {
            Ok(did) => writeln!(out, "round {round}: ok, {seconds:.1} s: {did}")?,
            Err(error) => {
                self.failed.push(round);
                writeln!(out, "round {round}: FAILED, {seconds:.1} s: {storm:?}: {error:#}")?;
            }
        }
        Ok(out.flush()?)
    }

    /// Whether every round went well.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty()
    }

    /// One line for all of it.
    #[must_use]
    pub fn summary(&self, seed: u64) -> String {
        let Self { rounds, failed, kinds } = self;
        let kinds: Vec<_> = kinds.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let line = format!("{rounds} rounds of seed {seed} ({})", kinds.join(", "));
        if failed.is_empty() {
            format!("{line}: none failed")
        } else {
            format!("{line}: {} failed: {failed:?}", failed.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_names_the_rounds_that_failed() {
        let kinds = [("Boots".to_owned(), 1), ("Kill".to_owned(), 2)].into();
        let soak = Soak { rounds: 3, failed: vec![1], kinds };
        assert!(!soak.is_clean());
        assert_eq!(soak.summary(5), "3 rounds of seed 5 (Boots 1, Kill 2): 1 failed: [1]");
    }
}
