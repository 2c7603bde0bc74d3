//! A virtio block device (virtio 1.3, section 5.2) on a raw file or a block device.
//!
//! A request's way: `device` pops a chain and has `request` read its header; what is left to do
//! becomes a `job`, which an engine (`uring`, or `blocking` where the host refuses io_uring)
//! carries out step by step straight between the file and the guest's memory; then the job's
//! status goes into the chain and the chain back to the guest.

pub mod args;
pub mod device;
pub mod disk;
pub mod seccomp;

mod blocking;
mod config;
mod job;
mod kept;
mod request;
mod sys;
mod uring;
