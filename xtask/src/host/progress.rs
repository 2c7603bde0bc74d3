//! Whether the host still gets anywhere: a slow one may take its time, a stuck one is ended.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The moment of the last sign of life.
#[derive(Debug)]
pub(super) struct Progress {
    last: Mutex<Instant>,
}

impl Progress {
    /// Starts counting now.
    pub(super) fn new() -> Self {
        Self { last: Mutex::new(Instant::now()) }
    }

    /// Notes a sign of life.
    pub(super) fn made(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How long there was none.
    pub(super) fn silence(&self) -> Duration {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}
