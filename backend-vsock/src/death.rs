//! Places between which a process may be killed, so that tests can have it die at each of them.
//!
//! They are counted: all stores to the ledger, and what is done to the world outside. A process that
//! is built with debug assertions and started with `NACRE_DIE_AFTER=n` ends at the place behind the
//! n-th, at once and with [`DEAD`]. In unit tests it is the thread that dies, by an unwinding that
//! its test expects.

/// The exit code of a process that died because it was asked to.
pub const DEAD: i32 = 86;

#[cfg(test)]
pub(crate) use self::thread::{after, reach};

/// A place is reached.
#[cfg(not(test))]
pub(crate) fn reach() {
    #[cfg(debug_assertions)]
    process::reach();
}

/// The process's own life.
#[cfg(all(not(test), debug_assertions))]
mod process {
    use std::env;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// How many more places the process lives.
    static LEFT: LazyLock<Option<AtomicU64>> = LazyLock::new(|| {
        let asked = env::var("NACRE_DIE_AFTER").ok()?;
        Some(AtomicU64::new(asked.parse().ok()?))
    });

    pub(super) fn reach() {
        if let Some(left) = &*LEFT
            && left.fetch_sub(1, Ordering::Relaxed) == 0
        {
            crate::sys::end(super::DEAD);
        }
    }
}

/// A thread's life, in unit tests.
#[cfg(test)]
mod thread {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    struct Death;

    pub(crate) fn reach() {
        let left = LEFT.take();
        LEFT.set(left.and_then(|left| left.checked_sub(1)));
        if left == Some(0) {
            resume_unwind(Box::new(Death));
        }
    }

    /// Runs `what` and has it die after so many places; gives nothing if it did.
    pub(crate) fn after<T>(places: usize, what: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(places));
        let ended = catch_unwind(AssertUnwindSafe(what));
        LEFT.set(None);
        match ended {
            Ok(value) => Some(value),
            Err(payload) if payload.is::<Death>() => None,
            Err(payload) => resume_unwind(payload),
        }
    }
}
