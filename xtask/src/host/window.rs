//! How many bytes a sender may have under way: taken before sending, given back by the receiver.

use super::protocol::{CHUNK_BYTES, WINDOW_BYTES};
use std::sync::{Condvar, Mutex, PoisonError};

/// The sender's side of a window; shared between the thread that sends and the one that hears of
/// credit.
#[derive(Debug)]
pub(crate) struct Window {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    free_bytes: u32,
    closed: bool,
}

impl Window {
    /// A window that is wholly free.
    pub(crate) fn new() -> Self {
        let state = State { free_bytes: WINDOW_BYTES, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Waits until something may be sent, and says how much at most, never more than a frame's
    /// worth; `None` when nothing can be sent any more. What is not used must be given back.
    pub(crate) fn take(&self) -> Option<usize> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self
            .changed
            .wait_while(state, |state| state.free_bytes == 0 && !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        let free_bytes = usize::try_from(state.free_bytes).unwrap_or(CHUNK_BYTES);
        let taken = free_bytes.min(CHUNK_BYTES);
        state.free_bytes -= u32::try_from(taken).unwrap_or(state.free_bytes);
        Some(taken)
    }

    /// Gives bytes back.
    pub(crate) fn give(&self, bytes: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free_bytes = state.free_bytes.saturating_add(bytes);
        self.changed.notify_all();
    }

    /// Ends all waiting, now and later.
    pub(crate) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn no_more_than_the_window_is_ever_taken() {
        let window = Window::new();
        let mut taken = 0;
        while taken < usize::try_from(WINDOW_BYTES).unwrap() {
            taken += window.take().unwrap();
        }
        assert_eq!(taken, usize::try_from(WINDOW_BYTES).unwrap());
        window.give(3);
        assert_eq!(window.take(), Some(3));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| window.take());
            window.give(1);
            assert_eq!(waiting.join().unwrap(), Some(1));
        });
    }

    #[test]
    fn closing_ends_a_wait() {
        let window = Window::new();
        while window.state.lock().unwrap().free_bytes > 0 {
            window.take().unwrap();
        }
        thread::scope(|scope| {
            let waiting = scope.spawn(|| window.take());
            window.close();
            assert_eq!(waiting.join().unwrap(), None);
        });
    }
}
