//! The network device: Ethernet frames between a guest's virtqueues and a tap interface.
//!
//! Flow of a frame out: `device` (a kick) -> `transmit` -> `header` (checked) -> `tap`. Flow of a
//! frame in: `device` (the tap is readable) -> `receive` -> `tap` -> `header` -> the guest's
//! buffers. Nothing here knows vhost-user, and nothing is opened after the start.

pub mod args;
pub mod device;
pub mod header;
mod kept;
pub mod seccomp;
pub mod tap;

mod control;
mod drops;
mod pairs;
mod receive;
mod sys;
mod transmit;
