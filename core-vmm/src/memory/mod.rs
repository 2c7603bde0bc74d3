//! The guest's RAM: where it stands in the guest, and the sealed memory file behind it.

pub mod hotplug;
pub mod layout;
pub mod region;
pub mod slots;
mod sys;
pub mod unit;
