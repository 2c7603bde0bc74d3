//! Devices that come to the running guest and go again.
//!
//! [`found`] tells what a driver makes of a device, [`order`] is what the host wants done with it,
//! [`give`] does that, [`inside`] reaches into the container, and [`users`] tells who has a device
//! in use. [`function`] is for devices of the host's that a container is made with.

pub(crate) mod found;
pub(crate) mod function;
pub(crate) mod give;
mod inside;
pub(crate) mod order;
mod users;
