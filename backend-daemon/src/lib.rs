//! What turns a device model into a restartable vhost-user process.

pub mod device;
pub mod process;
pub mod ring;

mod sys;
