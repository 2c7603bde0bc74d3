//! The real program on a real socket, driven by a guest's driver without KVM.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(unreachable_pub, reason = "a test's modules have no users outside")]

mod bytes;
mod closing;
mod connecting;
mod conversation;
mod guest;
mod hostile;
mod life;
mod program;
mod restart;
mod supervisor;
mod torture;
