//! Death between any two stores, for tests: the thread unwinds at a step that was agreed before.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::Step;

/// What a thread unwinds with.
struct Death(Step);

thread_local! {
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    static SEEN: RefCell<HashSet<Step>> = RefCell::new(HashSet::new());
}

pub(super) fn reach(step: Step) {
    let Some(left) = LEFT.get() else { return };
    SEEN.with_borrow_mut(|seen| seen.insert(step));
    LEFT.set(left.checked_sub(1));
    if left == 0 {
        resume_unwind(Box::new(Death(step)));
    }
}

/// Runs `what`, and dies at its step number `steps`. Gives the step, or what came of it alive.
pub(crate) fn survive<T>(steps: u32, what: impl FnOnce() -> T) -> Result<T, Step> {
    LEFT.set(Some(steps));
    let ended = catch_unwind(AssertUnwindSafe(what));
    LEFT.set(None);
    ended.map_err(|payload| match payload.downcast::<Death>() {
        Ok(death) => death.0,
        Err(other) => resume_unwind(other),
    })
}

/// Which steps this thread has come by.
pub(crate) fn seen() -> HashSet<Step> {
    SEEN.with_borrow(Clone::clone)
}
