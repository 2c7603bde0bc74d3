//! `nacre-fs` over its real socket: a guest's file operations, in the sandbox and the jail.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking and says on standard error why it is skipped"
)]

mod fuse;
mod keeper;
mod model;
mod requests;
mod restart;
mod sandbox;
mod submounts;
