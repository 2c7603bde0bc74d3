//! The VMM of one sandbox: guest memory, vCPUs, PCI, ACPI and one generic vhost-user frontend.
//!
//! It does nothing on the data path: a kick goes from the guest through a KVM ioeventfd to a
//! backend, an interrupt from the backend through an irqfd to the guest.

pub mod bus;
