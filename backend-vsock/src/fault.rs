//! The guest's faults, told without letting it fill the log.

/// Counts the guest's faults, and logs the first, the second, the fourth, and so on: a guest
/// that sends nothing but nonsense writes a few dozen lines in its whole life.
#[derive(Debug, Default)]
pub struct Faults {
    count: u64,
}

impl Faults {
    /// Takes note of one.
    pub fn note(&mut self, what: &str) {
        self.count = self.count.saturating_add(1);
        if self.count.is_power_of_two() {
            log::warn!("the guest: {what} (fault {})", self.count);
        }
    }
}
