//! What turns a device model into a restartable vhost-user process.
//!
//! The device half ([`device`], [`ring`]) is what a device is written against. The process half
//! ([`process`]) makes a program of it: arguments, sockets, jail, signals. Between them stand the
//! vhost-user protocol and the workers' threads, which no device sees.

pub mod device;
pub mod logging;
pub mod process;
pub mod ring;
#[cfg(feature = "testing")]
pub mod testing;

mod beside;
mod dirty;
mod doorbell;
mod fault;
mod inflight;
mod memory;
mod poll;
mod protocol;
mod session;
mod sys;
mod vring;
mod worker;
