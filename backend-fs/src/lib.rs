//! The file system device: a folder of the host as a virtio-fs share.
//!
//! FUSE itself is virtiofsd's, unmodified, as a library. This crate gives it requests from our
//! own daemon's queues, a sandbox in which the share is all there is, and the promise that no
//! request ends the process.
//!
//! Flow of a request: `device` (a kick) -> `request` (what can be said of it before virtiofsd
//! sees it) -> `share` (virtiofsd, on the guest's memory) -> `lasting` (our ids instead of
//! virtiofsd's) -> virtiofsd again -> the ring.
//!
//! What the guest holds outlives the process: `table` (nodes and open files) and `record` (how far
//! each queue's request got) are views on the `ledger`, which is the state that the supervisor
//! keeps; `keep` are files that have lost their names.

pub mod args;
pub mod device;
pub mod inheritance;
pub mod layout;
pub mod sandbox;
pub mod seccomp;
pub mod share;

mod keep;
mod kept;
mod lasting;
mod ledger;
mod mount;
mod record;
mod request;
mod sys;
mod table;
mod ticket;
