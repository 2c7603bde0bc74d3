//! Two programs that do the same in turns: how long each took, and the ratio of the two.

use std::fmt;
use std::time::Duration;

/// What was measured of one thing, in the order of the rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Versus {
    rounds: Vec<(Duration, Duration)>,
}

impl Versus {
    /// Takes in a round: ours, and theirs.
    pub fn add(&mut self, ours: Duration, theirs: Duration) {
        self.rounds.push((ours, theirs));
    }

    fn ours(&self) -> Vec<f64> {
        self.rounds.iter().map(|(ours, _)| milliseconds(*ours)).collect()
    }

    fn theirs(&self) -> Vec<f64> {
        self.rounds.iter().map(|(_, theirs)| milliseconds(*theirs)).collect()
    }

    /// The median of the rounds' own ratios of ours to theirs: both halves of a round were taken one
    /// after the other, under much the same load. None without a round.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let ratio = |(ours, theirs): &(Duration, Duration)| {
            milliseconds(*ours) / milliseconds(*theirs).max(f64::MIN_POSITIVE)
        };
        median(self.rounds.iter().map(ratio).collect())
    }
}

/// `ours p50 MIN..MAX, theirs p50 MIN..MAX (ms), ratio N`.
impl fmt::Display for Versus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(ours), Some(theirs), Some(ratio)) =
            (spread(self.ours()), spread(self.theirs()), self.ratio())
        else {
            return write!(f, "nothing was measured");
        };
        write!(f, "ours {ours}, QEMU {theirs} (ms), ratio {ratio:.2}")
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn spread(values: Vec<f64>) -> Option<String> {
    let least = values.iter().copied().reduce(f64::min)?;
    let most = values.iter().copied().reduce(f64::max)?;
    Some(format!("{:.1} [{least:.1}..{most:.1}]", median(values)?))
}

/// The middle one, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        1 => values.get(middle).copied(),
        _ => Some(values.get(middle.checked_sub(1)?)?.midpoint(*values.get(middle)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rounds: &[(u64, u64)]) -> Versus {
        let mut versus = Versus::default();
        for (ours, theirs) in rounds {
            versus.add(Duration::from_millis(*ours), Duration::from_millis(*theirs));
        }
        versus
    }

    #[test]
    fn a_median_is_the_middle_whatever_the_order() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), Some(3.0));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn the_ratio_is_that_of_rounds_and_not_of_medians() {
        // The medians are 20 and 20; in two of three rounds ours took half of the time.
        let ratio = of(&[(10, 20), (20, 40), (40, 10)]).ratio().unwrap();
        assert!((ratio - 0.5).abs() < 1e-9, "{ratio}");
        assert_eq!(of(&[]).ratio(), None);
    }

    #[test]
    fn a_line_tells_medians_extremes_and_the_ratio() {
        let line = of(&[(10, 20), (30, 60), (20, 40)]).to_string();
        assert_eq!(line, "ours 20.0 [10.0..30.0], QEMU 40.0 [20.0..60.0] (ms), ratio 0.50");
        assert_eq!(of(&[]).to_string(), "nothing was measured");
    }
}
