//! What a guest answers by `_OST` (ACPI 6.5, section 6.3.5), as all that comes and goes has it: what
//! the answer is about, and what became of that. Whoever hears it says what it means.

/// About a notification (ACPI 6.5, table 6.60): look at the bus.
pub(super) const BUS_CHECK: u32 = 0;
/// About a notification: look at the device.
pub(super) const DEVICE_CHECK: u32 = 1;
/// About a notification: give the device up.
pub(super) const EJECT_REQUEST: u32 = 3;
/// About an ejection that began in the guest.
pub(super) const OWN_EJECTION: u32 = 0x103;

/// It was done.
pub(super) const SUCCESS: u32 = 0;
/// An insertion will be done (ACPI 6.5, table 6.62).
pub(super) const INSERTION_PENDING: u32 = 0x80;
/// An ejection will be done (ACPI 6.5, table 6.61).
pub(super) const EJECTION_PENDING: u32 = 0x84;
