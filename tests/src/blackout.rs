//! How long a guest saw nothing of its device, and what became of its requests: read out of what a
//! load of the bare guest reports.
//!
//! Both clocks are the processor's time-stamp counter, that of the guest and that of the host. They
//! are set against each other by what the guest says between an order's sending and its answer.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::sys;

/// A moment on the host, in cycles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// This one.
    #[must_use]
    pub fn now() -> Self {
        Self(sys::cycles())
    }
}

/// A guest's line `report NOW DONE LOST REPEATED ERRORS AGE:LENGTH ...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    now: u64,
    /// What was counted since the load began.
    pub tally: Tally,
    /// Beginning and end in the guest's cycles.
    gaps: Vec<(u64, u64)>,
}

/// What a load counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Completions.
    pub done: u64,
    /// What was acknowledged or sent, and is not there.
    pub lost: u64,
    /// What was there more than once.
    pub repeated: u64,
    /// What failed.
    pub errors: u64,
}

/// The guest's clock as seen from the host.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: (Instant, Moment),
    /// The guest's counter is ahead of the host's by at least and at most so much.
    ahead: (i64, i64),
}

impl Report {
    /// Reads the words behind `report`.
    ///
    /// # Errors
    ///
    /// Fails if they are not as they should be.
    pub fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let mut number = || -> Result<u64> { Ok(words.next().context("a number")?.parse()?) };
        let now = number()?;
        let [done, lost, repeated, errors] = [number()?, number()?, number()?, number()?];
        let gap = |word: &str| -> Result<(u64, u64)> {
            let (age, len) = word.split_once(':').context("no gap")?;
            let from = now.wrapping_sub(u64::from_str_radix(age, 16)?);
            Ok((from, from.wrapping_add(u64::from_str_radix(len, 16)?)))
        };
        let gaps = words.map(gap).collect::<Result<_>>()?;
        Ok(Self { now, tally: Tally { done, lost, repeated, errors }, gaps })
    }
}

impl Clock {
    /// One of which nothing is known yet.
    #[must_use]
    pub fn new() -> Self {
        Self { started: (Instant::now(), Moment::now()), ahead: (i64::MIN, i64::MAX) }
    }

    /// The report was made after `asked`, and before now.
    ///
    /// # Errors
    ///
    /// Fails if the clocks do not go alike.
    pub fn learn(&mut self, asked: Moment, report: &Report) -> Result<()> {
        let ahead_of = |host: u64| report.now.wrapping_sub(host).cast_signed();
        self.ahead.0 = self.ahead.0.max(ahead_of(Moment::now().0));
        self.ahead.1 = self.ahead.1.min(ahead_of(asked.0));
        ensure!(self.ahead.0 <= self.ahead.1, "the guest's time-stamp counter drifts");
        Ok(())
    }

    /// The longest time without a completion that overlaps what lies between two moments, in
    /// nanoseconds. If the guest tells of none, it was shorter than the shortest that it tells of.
    ///
    /// # Errors
    ///
    /// Fails if the guest tells of none at all.
    pub fn blackout_ns(&self, report: &Report, from: Moment, to: Moment) -> Result<u64> {
        let (least, most) = self.ahead;
        // The same clock, if it may be.
        let ahead = if least <= 0 && 0 <= most { 0 } else { least.midpoint(most) };
        let here = |guest: u64| guest.wrapping_add_signed(ahead.wrapping_neg());
        let len = |(begin, end): &(u64, u64)| end.wrapping_sub(*begin);
        let overlaps = |(begin, end): &&(u64, u64)| here(*begin) < to.0 && from.0 < here(*end);
        let longest = report.gaps.iter().filter(overlaps).map(len).max();
        let cycles = longest.or_else(|| report.gaps.iter().map(len).min());
        Ok(self.nanoseconds(cycles.context("the guest tells of no gap")?))
    }

    /// What passed between two moments of the host, in nanoseconds.
    #[must_use]
    pub fn between_ns(&self, from: Moment, to: Moment) -> u64 {
        self.nanoseconds(to.0.saturating_sub(from.0))
    }

    fn nanoseconds(&self, cycles: u64) -> u64 {
        let (instant, moment) = self.started;
        let passed_ns = instant.elapsed().as_nanos();
        let passed = u128::from(Moment::now().0.wrapping_sub(moment.0)).max(1);
        u64::try_from(u128::from(cycles) * passed_ns / passed).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = self.ahead;
        match least <= 0 && 0 <= most {
            true => write!(f, "the guest has the host's time-stamp counter"),
            false => write!(f, "the guest's time-stamp counter is ahead by {least} to {most}"),
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// What the kills of one device came to; printed as one line.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Each kill's, in nanoseconds.
    pub blackouts_ns: Vec<u64>,
    /// Of the whole load.
    pub tally: Tally,
    /// How long each step of each replacement took, in nanoseconds, by its name.
    pub steps: BTreeMap<&'static str, Vec<u64>>,
    /// What is known of the clocks.
    pub clock: String,
}

impl Summary {
    /// What the line does not say: where the time went, and how much the guest had done.
    #[must_use]
    pub fn details(&self) -> String {
        let mut text = format!("completions={}", self.tally.done);
        for (step, lengths_ns) in &self.steps {
            let (middle, longest) = (ms(lengths_ns, 50), ms(lengths_ns, 100));
            text += &format!(", {step} p50={middle:.1} max={longest:.1} (ms)");
        }
        format!("{text}; {}", self.clock)
    }
}

/// The smallest length that at least so many of a hundred do not exceed, in milliseconds.
fn ms(lengths_ns: &[u64], percent: usize) -> f64 {
    let mut sorted = lengths_ns.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    let length = Duration::from_nanos(sorted.get(rank - 1).copied().unwrap_or(0));
    length.as_secs_f64() * 1000.0
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |percent| ms(&self.blackouts_ns, percent);
        let Tally { lost, repeated, errors, .. } = self.tally;
        write!(
            f,
            "kills={} p50={:.1} p99={:.1} max={:.1} (ms) lost={lost} repeated={repeated} \
             errors={errors}",
            self.blackouts_ns.len(),
            ms(50),
            ms(99),
            ms(100)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_the_guest_writes_it() -> Result<()> {
        let report = Report::parse("1000 7 1 2 3 ff:10 20:8")?;
        assert_eq!(report.tally, Tally { done: 7, lost: 1, repeated: 2, errors: 3 });
        assert_eq!(report.gaps, [(745, 761), (968, 976)]);
        assert!(Report::parse("1000 7 1 2").is_err());
        assert!(Report::parse("1000 7 1 2 3 x").is_err());
        Ok(())
    }

    #[test]
    fn the_blackout_is_the_longest_gap_around_the_kill_whatever_the_guest_s_clock_says()
    -> Result<()> {
        for ahead in [0_u64, 1 << 40, 0_u64.wrapping_sub(1 << 40)] {
            let start = Moment::now();
            let guest = |host: u64| start.0.wrapping_add(host).wrapping_add(ahead);
            let report = Report {
                now: guest(0),
                tally: Tally::default(),
                gaps: vec![(guest(0), guest(100)), (guest(5000), guest(5050))],
            };
            let mut clock = Clock::new();
            clock.ahead = (ahead.cast_signed() - 20, ahead.cast_signed() + 20);
            let at = |host: u64| Moment(start.0.wrapping_add(host));
            let long = clock.blackout_ns(&report, at(50), at(60))?;
            let short = clock.blackout_ns(&report, at(4990), at(5060))?;
            assert!(short <= long, "{short} {long}");
            let none = clock.blackout_ns(&report, at(2000), at(2010))?;
            assert!(none <= long, "at most the shortest");
        }
        Ok(())
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let blackouts_ns = (1..=200).map(|ms| ms * 1_000_000).rev().collect();
        let summary = Summary { blackouts_ns, ..Summary::default() };
        let text = summary.to_string();
        assert!(text.starts_with("kills=200 p50=100.0 p99=198.0 max=200.0 (ms) lost=0"), "{text}");
    }
}
