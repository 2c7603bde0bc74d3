//! The VMM with real backends on this machine's /dev/kvm, full or emulating, and a guest without a
//! kernel that runs in ring 3.

mod bad_input;
mod blk;
mod board;
mod hotplug_pci;
mod memory;
mod net;
mod processors;
mod restart;
mod stand_in;
mod vsock;
