//! `nacre-net` over its real socket, between a guest's driver and a tap in a network namespace.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking and says on standard error why it is skipped; its frames \
              are filled with low bytes of counters"
)]

mod frames;
mod host;
mod killed;
mod receive;
mod start;
mod storm;
mod supervised;
mod sys;
mod transmit;
