//! Death at any step that was agreed before, compiled in for tests only (feature `faults`).
//!
//! A process that is started with `NACRE_FAULT_STEP=n` aborts at its step number `n`, whichever
//! thread takes it: at each message of the frontend, at each call of a worker, and at each store
//! of the inflight protocol. A kill at a random moment hardly ever hits these.

use std::fmt::Debug;

/// A moment that is no store of the inflight protocol, which names its own.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Moment {
    /// A message of the frontend has come.
    MessageCame,
    /// It was carried out and answered.
    MessageHandled,
    /// A worker has done what can be done, and the guest was not told.
    Served,
    /// The guest was told.
    Announced,
}

/// Comes by a step.
pub(crate) fn pass(step: &dyn Debug) {
    #[cfg(feature = "faults")]
    armed::pass(step);
    #[cfg(not(feature = "faults"))]
    let _step = step;
}

/// Reads at which step to die. To be called before the jail closes.
pub(crate) fn arm() {
    #[cfg(feature = "faults")]
    armed::arm();
}

#[cfg(feature = "faults")]
mod armed {
    use std::env;
    use std::fmt::Debug;
    use std::process::abort;
    use std::sync::atomic::{AtomicI64, Ordering};

    use crate::logging::say;

    /// How many steps are left; nobody lives to see the last of so many.
    static LEFT: AtomicI64 = AtomicI64::new(i64::MAX);

    pub(super) fn arm() {
        let typed = env::var("NACRE_FAULT_STEP").ok().and_then(|typed| typed.parse().ok());
        if let Some(steps) = typed {
            LEFT.store(steps, Ordering::Relaxed);
        }
    }

    pub(super) fn pass(step: &dyn Debug) {
        if LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
            say(&format!("fault: dies at {step:?}"));
            abort();
        }
    }
}
