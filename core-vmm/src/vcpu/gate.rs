//! The gate that lets all vCPU threads run, holds them, and ends them.
//!
//! ```text
//!   Hold ---- Run ----> Run       any ---- Finish ----> Finish
//!    |  <--- hold() ---+
//!    +---- Reset: each vCPU takes its start state once, then holds
//! ```
//!
//! The control thread gives the orders. A vCPU thread may only `hold` (the guest powered off:
//! nobody may run on), and learns its orders in `next_order`, where it waits when there is nothing
//! to do. Between two entries of the guest a thread looks at two atomic flags only. To get a thread
//! out of the guest is the caller's task (`Vcpus::hold` sends the signal).
//!
//! Each vCPU has a place at the gate. One that is not there for the guest has none to run from: it
//! takes its start state once (`Park`) and waits, whatever is ordered, until it is admitted.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::{boot::Entry, locked};

/// What a vCPU thread is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Wait.
    Hold,
    /// Run the guest until the gate closes.
    Run,
    /// Take the start state; the boot processor's first instruction is there.
    Reset(Entry),
    /// This vCPU alone: take the start state, and come back.
    Park,
    /// End the thread.
    Finish,
}

/// What a vCPU may do at an open gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Run.
    Admitted,
    /// Wait, once it is out of the guest.
    Dismissed,
    /// Wait, as it does.
    Parked,
}

/// The gate of one VM's vCPUs.
#[derive(Debug)]
pub struct Gate {
    /// True only while the order is `Run`; the fast look of a vCPU thread.
    is_open: AtomicBool,
    /// True only while the vCPU of that index is admitted; the other half of that look.
    is_admitted: Box<[AtomicBool]>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    order: Order,
    places: Vec<Place>,
    /// Counts orders, so that a thread knows whether it has obeyed the latest.
    epoch: u64,
    /// Threads that obeyed the latest order and wait.
    waiting: usize,
    /// Threads that have ended.
    gone: usize,
}

/// One vCPU thread at the gate; dropping it tells that the thread ends.
#[derive(Debug)]
pub struct Visitor<'a> {
    gate: &'a Gate,
    /// Its vCPU's.
    place: usize,
    /// It was told to park.
    is_parking: bool,
    /// The latest reset that it took.
    obeyed: Option<u64>,
    /// The latest order for which it is counted as waiting.
    counted: Option<u64>,
}

impl Gate {
    /// A closed gate for one vCPU.
    #[must_use]
    pub fn new() -> Self {
        Self::with(1, 1)
    }

    /// A closed gate for so many vCPUs, the first of which are admitted.
    #[must_use]
    pub fn with(places: u32, admitted: u32) -> Self {
        let is_admitted = |index| AtomicBool::new(index < admitted);
        let place = |index| if index < admitted { Place::Admitted } else { Place::Parked };
        let state = State {
            order: Order::Hold,
            places: (0..places).map(place).collect(),
            epoch: 0,
            waiting: 0,
            gone: 0,
        };
        Self {
            is_open: AtomicBool::new(false),
            is_admitted: (0..places).map(is_admitted).collect(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// The state is plain numbers that are right at any moment, so a panic elsewhere spoils none.
    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    fn give(&self, state: &mut State, order: Order) {
        state.order = order;
        state.epoch += 1;
        state.waiting = 0;
        self.is_open.store(order == Order::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Gives an order to all threads.
    pub fn order(&self, order: Order) {
        let mut state = self.lock();
        // After the end there are no more orders.
        if state.order != Order::Finish {
            self.give(&mut state, order);
        }
    }

    /// Closes the gate if it is open.
    pub fn hold(&self) {
        let mut state = self.lock();
        if state.order == Order::Run {
            self.give(&mut state, Order::Hold);
        }
    }

    /// Whether the thread of vCPU `index` may go into the guest.
    pub fn is_open(&self, index: u32) -> bool {
        let admitted = self.is_admitted.get(to_place(index));
        self.is_open.load(Ordering::SeqCst)
            && admitted.is_some_and(|admitted| admitted.load(Ordering::SeqCst))
    }

    fn set_place(&self, state: &mut State, index: u32, place: Place) {
        let at = to_place(index);
        if let (Some(known), Some(admitted)) = (state.places.get_mut(at), self.is_admitted.get(at))
        {
            *known = place;
            admitted.store(place == Place::Admitted, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// Lets a vCPU that was parked run when the gate is open.
    pub fn admit(&self, index: u32) {
        self.set_place(&mut self.lock(), index, Place::Admitted);
    }

    /// Keeps a vCPU that was admitted from going into the guest again.
    pub fn dismiss(&self, index: u32) {
        let mut state = self.lock();
        if state.places.get(to_place(index)) == Some(&Place::Admitted) {
            self.set_place(&mut state, index, Place::Dismissed);
        }
    }

    /// Waits until a vCPU that was dismissed is parked or its thread has ended.
    pub fn wait_dismissed(&self, index: u32) {
        let mut state = self.lock();
        while state.places.get(to_place(index)) == Some(&Place::Dismissed) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Admits the first `count` vCPUs and no others, while all threads wait.
    pub fn admit_first(&self, count: u32) {
        let mut state = self.lock();
        for index in (0..).take(self.is_admitted.len()) {
            let place = if index < count { Place::Admitted } else { Place::Parked };
            self.set_place(&mut state, index, place);
        }
    }

    /// Waits until `count` threads wait or have ended.
    pub fn wait_for(&self, count: usize) {
        let mut state = self.lock();
        while state.waiting + state.gone < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Enters the thread of vCPU `index`.
    pub fn visit(&self, index: u32) -> Visitor<'_> {
        let place = to_place(index);
        Visitor { gate: self, place, is_parking: false, obeyed: None, counted: None }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

fn to_place(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

impl State {
    fn place(&self, index: usize) -> Place {
        self.places.get(index).copied().unwrap_or(Place::Parked)
    }

    fn set_parked(&mut self, index: usize) {
        if let Some(place) = self.places.get_mut(index)
            && *place == Place::Dismissed
        {
            *place = Place::Parked;
        }
    }
}

impl Visitor<'_> {
    /// Waits for something to do: `Run`, `Finish`, or `Reset` and `Park` once for each time it is
    /// ordered.
    pub fn next_order(&mut self) -> Order {
        let gate = self.gate;
        let mut state = gate.lock();
        loop {
            match state.order {
                Order::Finish => return state.order,
                Order::Run if state.place(self.place) == Place::Admitted => {
                    self.is_parking = false;
                    return state.order;
                }
                Order::Reset(_) if self.obeyed != Some(state.epoch) => {
                    self.obeyed = Some(state.epoch);
                    return state.order;
                }
                Order::Run | Order::Reset(_) | Order::Hold | Order::Park => {}
            }
            if state.place(self.place) == Place::Dismissed {
                if !std::mem::replace(&mut self.is_parking, true) {
                    return Order::Park;
                }
                state.set_parked(self.place);
                gate.changed.notify_all();
            }
            self.is_parking = false;
            if self.counted != Some(state.epoch) {
                self.counted = Some(state.epoch);
                state.waiting += 1;
                gate.changed.notify_all();
            }
            state = gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Visitor<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.gone += 1;
        state.set_parked(self.place);
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    const ENTRY: Entry = Entry { address: 0x100_0000, is_long_mode: false };

    /// A thread that tells its orders and spins while it is let.
    fn obey(gate: &Gate, index: u32, seen: &mpsc::Sender<(u32, Order)>) {
        let mut visitor = gate.visit(index);
        loop {
            let order = visitor.next_order();
            seen.send((index, order)).unwrap();
            if order == Order::Finish {
                return;
            }
            while gate.is_open(index) {
                thread::yield_now();
            }
        }
    }

    /// What the threads of two vCPUs are told while `orders` are given.
    fn watch(gate: &Gate, orders: impl FnOnce(&mpsc::Receiver<(u32, Order)>)) {
        let (sender, seen) = mpsc::channel();
        thread::scope(|scope| {
            for index in 0..2 {
                let sender = sender.clone();
                scope.spawn(move || obey(gate, index, &sender));
            }
            gate.wait_for(2);
            assert!(seen.try_recv().is_err(), "a closed gate lets nobody through");
            orders(&seen);
            gate.order(Order::Finish);
        });
        gate.wait_for(2);
    }

    fn sorted(mut orders: Vec<(u32, Order)>) -> Vec<(u32, Order)> {
        orders.sort_by_key(|(index, _order)| *index);
        orders
    }

    #[test]
    fn threads_hold_run_reset_once_and_finish_as_ordered() {
        let gate = Gate::with(2, 2);
        watch(&gate, |seen| {
            gate.order(Order::Run);
            let run = vec![seen.recv().unwrap(), seen.recv().unwrap()];
            assert_eq!(sorted(run), [(0, Order::Run), (1, Order::Run)]);
            gate.hold();
            gate.wait_for(2);
            gate.order(Order::Reset(ENTRY));
            gate.wait_for(2);
            let reset = sorted(seen.try_iter().collect());
            assert_eq!(reset, [(0, Order::Reset(ENTRY)), (1, Order::Reset(ENTRY))]);
            gate.order(Order::Finish);
            gate.order(Order::Run);
            let finish = vec![seen.recv().unwrap(), seen.recv().unwrap()];
            assert_eq!(sorted(finish), [(0, Order::Finish), (1, Order::Finish)]);
        });
    }

    #[test]
    fn a_vcpu_runs_only_while_it_is_admitted_and_parks_once_each_time() {
        let gate = Gate::with(2, 1);
        watch(&gate, |seen| {
            gate.order(Order::Run);
            assert_eq!(seen.recv().unwrap(), (0, Order::Run));
            for _ in 0..3 {
                gate.admit(1);
                assert_eq!(seen.recv().unwrap(), (1, Order::Run));
                gate.dismiss(1);
                gate.wait_dismissed(1);
                assert_eq!(seen.try_iter().collect::<Vec<_>>(), [(1, Order::Park)]);
            }
            assert!(gate.is_open(0) && !gate.is_open(1));
            // It is held and reset with the others, and parks again only if it ran.
            gate.hold();
            gate.wait_for(2);
            gate.dismiss(1);
            gate.wait_dismissed(1);
            gate.order(Order::Reset(ENTRY));
            gate.wait_for(2);
            assert_eq!(seen.try_iter().count(), 2);
            gate.admit_first(2);
            gate.order(Order::Run);
            let run = vec![seen.recv().unwrap(), seen.recv().unwrap()];
            assert_eq!(sorted(run), [(0, Order::Run), (1, Order::Run)]);
        });
    }

    #[test]
    fn one_that_is_dismissed_at_a_closed_gate_parks_there() {
        let gate = Gate::with(2, 2);
        watch(&gate, |seen| {
            gate.dismiss(1);
            gate.wait_dismissed(1);
            assert_eq!(seen.recv().unwrap(), (1, Order::Park));
        });
    }

    #[test]
    fn a_thread_that_dies_is_not_waited_for() {
        let gate = Gate::with(1, 1);
        let visitor = gate.visit(0);
        gate.dismiss(0);
        drop(visitor);
        gate.wait_for(1);
        gate.wait_dismissed(0);
    }

    #[test]
    fn holding_a_gate_that_is_closed_changes_no_order() {
        let gate = Gate::with(1, 1);
        gate.order(Order::Reset(ENTRY));
        gate.hold();
        assert_eq!(gate.visit(0).next_order(), Order::Reset(ENTRY));
    }
}
