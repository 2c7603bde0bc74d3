//! Real Linux guests on a host with full KVM: `nacre` as a user types it.

mod bad_input;
mod container;
mod devices;
mod ending;
mod failure;
mod hotplug_cpu;
mod hotplug_memory;
mod hotplug_pci;
mod image;
mod jail;
mod lifecycle;
mod limits;
mod machine;
mod network;
mod pod;
mod resize;
mod restart;
mod restart_fs;
mod restart_vsock;
mod timing;
mod vfio;
mod vfio_hotplug;
mod vfio_vmm;
