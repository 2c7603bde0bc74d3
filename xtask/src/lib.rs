//! What a developer runs: the packages, the KVM host, the guest image and the first command.
//!
//! Everything that is fetched or made lies in one cache folder ([`cache`]) and is made once.
//! Nothing here installs a kernel on the machine or edits its apt sources.

pub mod bench;
pub mod bzimage;
pub mod cache;
pub mod cpio;
pub mod executor;
pub mod fuzz;
pub mod guest_image;
pub mod host;
pub mod modules;
pub mod packages;
pub mod programs;
pub mod report;
pub mod run;
pub mod shell_image;
pub mod soak;
mod sys;
pub mod table;
pub mod test;
mod test_bare;
mod test_command;
mod test_linux;
mod test_queue;
pub mod tidy;
pub mod tool;
