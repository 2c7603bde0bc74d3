//! Loads that go on while a device's backend is killed and replaced, and what they tell the host.
//!
//! Each completion is stamped with the processor's time-stamp counter, and the longest times
//! between two are kept. The host orders by a byte on the serial port, which is looked at right
//! after a completion and seldom, since a look is an exit: `r` asks for a report and `q` for the
//! end. What is reported begins anew after each report, and the time of a report itself is no gap.

pub mod blk;
pub mod fs;
pub mod net;
pub mod vsock;

use core::arch::x86_64::_rdtsc;

use crate::machine::inb;
use crate::say;

/// How many gaps a report has at most: enough for the one that matters on a machine where others
/// want the processors too.
const GAPS: usize = 8;
/// How many cycles pass between two looks at the serial port: some milliseconds.
const LISTEN_EVERY: u64 = 8_000_000;

/// What a load came to.
#[derive(Default)]
pub struct Tally {
    pub done: u64,
    pub lost: u64,
    pub repeated: u64,
    pub errors: u64,
}

/// A load's completions.
pub struct Watch {
    pub tally: Tally,
    last: u64,
    /// Beginning and length in cycles, in no order.
    gaps: [(u64, u64); GAPS],
    listened: u64,
    over: bool,
}

/// Waits for an order of the host, whatever it is.
pub fn wait_for_order() -> u8 {
    while inb(0x3fd) & 1 == 0 {
        core::hint::spin_loop();
    }
    inb(0x3f8)
}

/// The time-stamp counter.
pub fn now() -> u64 {
    unsafe { _rdtsc() }
}

impl Watch {
    /// Says that the load begins.
    pub fn start() -> Self {
        say!("READY");
        let last = now();
        Self { tally: Tally::default(), last, gaps: [(0, 0); GAPS], listened: last, over: false }
    }

    /// Something was completed, just now.
    pub fn completed(&mut self) {
        let now = now();
        self.tally.done += 1;
        let shortest = self.gaps.iter_mut().min_by_key(|(_from, len)| *len).expect("some gaps");
        let len = now.wrapping_sub(self.last);
        if len > shortest.1 {
            *shortest = (self.last, len);
        }
        self.last = now;
        if now.wrapping_sub(self.listened) > LISTEN_EVERY {
            self.listened = now;
            self.listen();
        }
    }

    /// Whether the host asked for the end.
    pub fn is_over(&self) -> bool {
        self.over
    }

    fn listen(&mut self) {
        // Line status: a byte has come.
        while inb(0x3fd) & 1 != 0 {
            match inb(0x3f8) {
                b'r' => self.report(),
                b'q' => {
                    say!("over");
                    self.over = true;
                }
                _ => {}
            }
        }
    }

    /// One line: the counter now, what was counted, and the gaps as `age:length` in cycles.
    pub fn report(&mut self) {
        use core::fmt::Write as _;
        let Tally { done, lost, repeated, errors } = self.tally;
        let now = now();
        let mut line = alloc::string::String::new();
        write!(line, "report {now} {done} {lost} {repeated} {errors}").expect("memory");
        for (from, len) in self.gaps.iter().filter(|(_from, len)| *len != 0) {
            write!(line, " {:x}:{len:x}", now.wrapping_sub(*from)).expect("memory");
        }
        say!("{line}");
        self.gaps = [(0, 0); GAPS];
        self.last = self::now();
    }
}

/// Numbers that look like chance, the same each time.
pub struct Dice(u64);

impl Dice {
    pub fn new() -> Self {
        Self(1)
    }

    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) as usize % sides
    }
}
