#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
//! containerd's protocols in front of a guest whose processes are scripted, over real sockets and
//! fifos.

mod containerd;
mod guest;
mod lifecycle;
mod restart;
mod sandbox;
mod streams;
