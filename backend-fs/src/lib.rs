//! The file system device: a folder of the host as a virtio-fs share.
//!
//! FUSE itself is virtiofsd's, unmodified, as a library. This crate gives it requests from our
//! own daemon's queues, a sandbox in which the share is all there is, and the promise that no
//! request ends the process.
//!
//! Flow of a request: `device` (a kick) -> `request` (what can be said of it before virtiofsd
//! sees it) -> `share` (virtiofsd, on the guest's memory) -> the ring.

pub mod args;
pub mod device;
pub mod sandbox;
pub mod seccomp;
pub mod share;

mod request;
mod sys;
