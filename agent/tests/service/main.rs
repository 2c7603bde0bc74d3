//! The agent's whole service over unix sockets, in private namespaces, with busybox as container.
//!
//! Needs root and `/bin/busybox` (package busybox-static); says so and skips otherwise.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests, where a failure is the answer and skips are told"
)]

mod agent;
mod configure;
mod control;
mod device_rules;
mod exec;
mod filter;
mod forward;
mod lifecycle;
mod limits;
mod pod;
mod refusals;
mod streams;
mod terminal;
