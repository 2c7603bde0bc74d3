//! ACPI, hardware-reduced: no power-management block, no SCI, no embedded controller. Tables in
//! memory tell what there is; one event device and a few registers are all that acts.

pub mod cpu_hotplug;
pub mod dsdt;
pub mod ged;
pub(crate) mod host_bridge;
mod interrupt_pins;
pub mod memory_hotplug;
mod ost;
pub mod pci_hotplug;
pub mod reminder;
pub mod tables;
