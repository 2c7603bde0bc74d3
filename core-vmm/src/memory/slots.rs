//! The numbers of KVM's memory slots, given out in one place: boot RAM, RAM that is plugged later,
//! and what a passed-through device lets the guest map all take from here.
//!
//! A number goes back when its [`Slot`] is dropped; whoever holds one has KVM forget the slot
//! before.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard},
};

use kvm_ioctls::{Cap, VmFd};

use crate::locked;

/// No slot is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all {limit} memory slots that KVM gives one VM are in use")]
pub struct NoSlot {
    /// How many there are.
    pub limit: u32,
}

#[derive(Debug)]
struct State {
    limit: u32,
    taken: BTreeSet<u32>,
}

/// Which slots are taken.
///
/// Shared, because a device's slots come and go with the vCPU that moves its BAR, and those of RAM
/// with the control thread.
#[derive(Clone, Debug)]
pub struct Slots {
    state: Arc<Mutex<State>>,
}

/// One slot's number.
#[derive(Debug)]
pub struct Slot {
    number: u32,
    slots: Slots,
}

impl Slots {
    /// As many slots as KVM has for `vm`.
    #[must_use]
    pub fn of(vm: &VmFd) -> Self {
        // What every KVM has, for one that does not say (Documentation/virt/kvm/api.rst).
        const AT_LEAST: u32 = 32;
        let limit = u32::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        Self::with_limit(limit.max(AT_LEAST))
    }

    /// So many slots.
    #[must_use]
    pub fn with_limit(limit: u32) -> Self {
        Self { state: Arc::new(Mutex::new(State { limit, taken: BTreeSet::new() })) }
    }

    /// The lowest slot that is free.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn take(&self) -> Result<Slot, NoSlot> {
        let mut state = self.lock();
        let limit = state.limit;
        let number = (0..limit).find(|number| !state.taken.contains(number));
        let number = number.ok_or(NoSlot { limit })?;
        state.taken.insert(number);
        drop(state);
        Ok(Slot { number, slots: self.clone() })
    }

    /// How many are free.
    #[must_use]
    pub fn free(&self) -> usize {
        let state = self.lock();
        usize::try_from(state.limit).unwrap_or(usize::MAX).saturating_sub(state.taken.len())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

impl Slot {
    /// Its number in KVM.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().taken.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::proptest};

    use super::*;

    #[test]
    fn the_last_slot_is_given_out_and_no_further_one() {
        let slots = Slots::with_limit(2);
        let (first, second) = (slots.take().unwrap(), slots.take().unwrap());
        assert_eq!((first.number(), second.number()), (0, 1));
        assert_eq!(slots.take().unwrap_err(), NoSlot { limit: 2 });
        drop(first);
        assert_eq!(slots.take().unwrap().number(), 0);
    }

    proptest! {
        #[test]
        fn no_number_is_held_twice_and_none_gets_lost(choices in vec((0_usize..16, 0..3), 0..64)) {
            let slots = Slots::with_limit(8);
            let mut held: Vec<Slot> = Vec::new();
            for (index, choice) in choices {
                if choice > 0 {
                    held.extend(slots.take());
                } else if !held.is_empty() {
                    held.swap_remove(index % held.len());
                }
                let numbers: BTreeSet<_> = held.iter().map(Slot::number).collect();
                assert_eq!(numbers.len(), held.len());
                assert_eq!(slots.free(), 8 - held.len());
            }
        }
    }
}
