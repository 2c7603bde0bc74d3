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
//! to do. Between two entries of the guest a thread looks at one atomic flag only. To get a thread
//! out of the guest is the caller's task (`Vcpus::hold` sends the signal).

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::boot::Entry;

/// What a vCPU thread is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Wait.
    Hold,
    /// Run the guest until the gate closes.
    Run,
    /// Take the start state; the boot processor's first instruction is there.
    Reset(Entry),
    /// End the thread.
    Finish,
}

/// The gate of one VM's vCPUs.
#[derive(Debug)]
pub struct Gate {
    /// True only while the order is `Run`; the fast look of a vCPU thread.
    is_open: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    order: Order,
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
    /// The latest reset that it took.
    obeyed: Option<u64>,
    /// The latest order for which it is counted as waiting.
    counted: Option<u64>,
}

impl Gate {
    /// A closed gate.
    #[must_use]
    pub fn new() -> Self {
        Self {
            is_open: AtomicBool::new(false),
            state: Mutex::new(State { order: Order::Hold, epoch: 0, waiting: 0, gone: 0 }),
            changed: Condvar::new(),
        }
    }

    /// The state is plain numbers that are right at any moment, so a panic elsewhere spoils none.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Whether a thread may go into the guest.
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::SeqCst)
    }

    /// Waits until `count` threads wait or have ended.
    pub fn wait_for(&self, count: usize) {
        let mut state = self.lock();
        while state.waiting + state.gone < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Enters a thread.
    pub fn visit(&self) -> Visitor<'_> {
        Visitor { gate: self, obeyed: None, counted: None }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Visitor<'_> {
    /// Waits for something to do: `Run`, `Finish`, or `Reset` once for each time it is ordered.
    pub fn next_order(&mut self) -> Order {
        let gate = self.gate;
        let mut state = gate.lock();
        loop {
            match state.order {
                Order::Run | Order::Finish => return state.order,
                Order::Reset(_) if self.obeyed != Some(state.epoch) => {
                    self.obeyed = Some(state.epoch);
                    return state.order;
                }
                Order::Reset(_) | Order::Hold => {}
            }
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
        self.gate.lock().gone += 1;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    const ENTRY: Entry = Entry { address: 0x100_0000, is_long_mode: false };

    /// A thread that tells its orders and spins while it is let.
    fn obey(gate: &Gate, seen: &mpsc::Sender<Order>) {
        let mut visitor = gate.visit();
        loop {
            let order = visitor.next_order();
            seen.send(order).unwrap();
            if order == Order::Finish {
                return;
            }
            while gate.is_open() {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn threads_hold_run_reset_once_and_finish_as_ordered() {
        let gate = Gate::new();
        let (sender, seen) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..2 {
                let (gate, sender) = (&gate, sender.clone());
                scope.spawn(move || obey(gate, &sender));
            }
            gate.wait_for(2);
            assert!(seen.try_recv().is_err(), "a closed gate lets nobody through");
            gate.order(Order::Run);
            assert_eq!([seen.recv().unwrap(), seen.recv().unwrap()], [Order::Run; 2]);
            gate.hold();
            gate.wait_for(2);
            gate.order(Order::Reset(ENTRY));
            gate.wait_for(2);
            assert_eq!(seen.try_iter().collect::<Vec<_>>(), [Order::Reset(ENTRY); 2]);
            gate.order(Order::Finish);
            gate.order(Order::Run);
            assert_eq!([seen.recv().unwrap(), seen.recv().unwrap()], [Order::Finish; 2]);
        });
        gate.wait_for(2);
    }

    #[test]
    fn a_thread_that_dies_is_not_waited_for() {
        let gate = Gate::new();
        drop(gate.visit());
        gate.wait_for(1);
    }

    #[test]
    fn holding_a_gate_that_is_closed_changes_no_order() {
        let gate = Gate::new();
        gate.order(Order::Reset(ENTRY));
        gate.hold();
        assert_eq!(gate.visit().next_order(), Order::Reset(ENTRY));
    }
}
