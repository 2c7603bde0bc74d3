//! What comes and goes while the guest runs, each told top to bottom: how it is added, how the guest
//! is told, what its ejection brings about, and what a reset of the guest ends.
//!
//! Only the control thread calls what is here.

pub mod cpus;
pub mod devices;
pub mod memory;
