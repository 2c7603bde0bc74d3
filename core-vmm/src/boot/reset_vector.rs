//! What stands where firmware's first instruction would be: a reset.
//!
//! Linux on hardware-reduced ACPI does not restart by the ACPI reset register. It tries EFI first
//! (`reboot_init` in `arch/x86/kernel/reboot.c` takes for granted that there is one) and goes on to
//! jump to F000:FFF0 in real mode, and would hang there.

use crate::legacy::power;

/// `mov dx, reset port; mov al, reset value; out dx, al`, then halt for ever.
pub(super) const CODE: [u8; 9] = {
    let [low, high, ..] = (power::PORT + power::RESET).to_le_bytes();
    [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};
