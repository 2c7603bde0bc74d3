//! Real Linux guests on a host with full KVM: `nacre` as a user types it.

mod container;
mod devices;
mod failure;
mod lifecycle;
mod machine;
