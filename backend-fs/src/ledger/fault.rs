//! Death at a chosen store, for tests: a panic that nothing catches but the test.

use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind};
use std::thread::panicking;

use backend_daemon::process::State;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// What a process that "dies" panics with.
pub(crate) struct Death;

thread_local! {
    /// How many more stores this thread may make; nothing if any number.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// A store is about to be made; whether it is.
pub(super) fn reach() -> bool {
    match LEFT.get() {
        None => true,
        // Whoever is dead stores nothing any more, while the panic unwinds either.
        Some(0) if panicking() => false,
        Some(0) => panic_any(Death),
        Some(left) => {
            LEFT.set(Some(left - 1));
            true
        }
    }
}

/// Lets `act` make `stores` stores, and gives whether it wanted to make more.
pub(crate) fn dies_at(stores: u32, act: impl FnOnce()) -> bool {
    LEFT.set(Some(stores));
    let outcome = catch_unwind(AssertUnwindSafe(act));
    LEFT.set(None);
    match outcome {
        Ok(()) => false,
        Err(payload) if payload.is::<Death>() => true,
        Err(payload) => resume_unwind(payload),
    }
}

/// New state, as a supervisor makes it.
pub(crate) fn state(len_bytes: usize) -> State {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("state", flags).unwrap());
    file.set_len(len_bytes as u64).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    State::map(file).unwrap()
}
