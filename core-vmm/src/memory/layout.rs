//! Where things stand in the guest's physical address space; constants and arithmetic only.
//!
//! ```text
//! 0            RAM: boot data below 640 KiB, ACPI tables in 0xe0000..1 MiB, the kernel from there
//! LOW_RAM_END  0xc000_0000  32-bit PCI window, 640 MiB
//!              0xe800_0000  ECAM of the first segment's bus, 1 MiB
//!              0xe810_0000  hotplug and event registers, one page
//!              0xe820_0000  ECAM of further segments, 1 MiB each
//!              0xfec0_0000  I/O APIC       (in KVM)
//!              0xfee0_0000  local APICs    (in KVM)
//!              0xfffb_c000  identity-map page and three TSS pages of KVM on Intel
//! HIGH_RAM_START 4 GiB      the rest of RAM, then room for hotplugged memory
//! 3/4 of the guest's width  64-bit PCI windows, up to the width's end, equally long
//! ```

use std::ops::Range;

use vm_memory::GuestAddress;

/// Sizes of RAM and of what hotplug adds are multiples of this, and so is every host address that
/// backs RAM, so that the host may map it in large pages.
pub const RAM_ALIGN_BYTES: u64 = 2 << 20;

/// The end of the RAM below 4 GiB, at most.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// The start of the RAM that does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Boot data: the descriptor table that the boot state's segments stand in.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Boot data: PVH start info, one page.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// Boot data: PVH memory map and module list, one page.
pub const PVH_TABLES: GuestAddress = GuestAddress(0x7000);
/// Boot data: the zero page of the Linux boot protocol.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x8000);
/// Boot data: page tables that map the first 4 GiB to themselves, six pages.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Boot data: the kernel's command line, one page.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// The longest command line in bytes with its final zero: Linux silently cuts a longer one.
pub const COMMAND_LINE_BYTES: usize = 2048;
/// The end of conventional memory; what lies between here and 1 MiB is no RAM to the guest.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// ACPI tables, with the RSDP first: inside the area that a guest without any hint searches.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_f000;
/// Where real mode begins after a reset, F000:FFF0. See `boot::reset_vector`.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// All that is between conventional memory's end and the kernel and is told as reserved.
pub const FIRMWARE: Range<u64> = 0xe_0000..0x10_0000;
/// Where kernels go: nothing but RAM from here to the end of low RAM.
pub const KERNEL_START: u64 = 0x10_0000;

/// The 32-bit PCI window.
pub const PCI_WINDOW_32: Range<u64> = 0xc000_0000..0xe800_0000;
/// ECAM of the first segment's bus: 256 functions of 4 KiB.
pub const ECAM: Range<u64> = 0xe800_0000..0xe810_0000;
/// ECAMs of the segments after the first one.
pub const FURTHER_ECAMS: Range<u64> = 0xe820_0000..0xe8d0_0000;
/// The most PCI segments of a VM: what the ACPI tables have room for beside all else.
pub const MAX_PCI_SEGMENTS: u16 = 12;
/// The event device's register and the hotplug registers.
pub const EVENT_REGISTERS: Range<u64> = 0xe810_0000..0xe810_1000;
/// In it: the event device's register.
pub const EVENT_DEVICE: Range<u64> = 0xe810_0000..0xe810_0010;
/// In it: what adds and removes vCPUs.
pub const CPU_HOTPLUG: Range<u64> = 0xe810_0100..0xe810_0140;
/// In it: what adds and removes RAM.
pub const MEMORY_HOTPLUG: Range<u64> = 0xe810_0200..0xe810_0240;
/// In it: what adds and removes PCI functions.
pub const PCI_HOTPLUG: Range<u64> = 0xe810_0300..0xe810_0320;
/// The I/O APIC's registers, where KVM has them.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers, where KVM has them.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page for KVM's identity map: Intel without unrestricted guest runs real mode on it.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's task state segment, for the same.
pub const TSS: usize = 0xfffb_d000;
/// What KVM takes for both of them.
pub const KVM_PAGES: Range<u64> = IDENTITY_MAP..0xfffc_0000;

/// The serial console's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The event device's interrupt.
pub const EVENT_GSI: u32 = 5;
/// The I/O APIC's pins; message-signalled interrupts have their GSIs from here on.
pub const IO_APIC_PINS: u32 = 24;

/// No guest is given more physical address bits than this to put things at.
///
/// Linux maps no more RAM with four-level page tables, and hosts with four-level nested tables
/// can't map a guest address above bit 47 although their CPUID may say so.
const MAX_ADDRESS_BITS: u32 = 46;

/// The RAM below and above 4 GiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ram {
    /// From 0 to [`LOW_RAM_END`] at most.
    pub low: Range<u64>,
    /// From [`HIGH_RAM_START`]; may be empty.
    pub high: Range<u64>,
}

impl Ram {
    /// Splits `bytes` of RAM around the hole below 4 GiB.
    #[must_use]
    pub fn of(bytes: u64) -> Self {
        let low = bytes.min(LOW_RAM_END);
        Self { low: 0..low, high: HIGH_RAM_START..HIGH_RAM_START + (bytes - low) }
    }

    /// The parts that are not empty, lowest first.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        [&self.low, &self.high].into_iter().filter(|range| !range.is_empty()).cloned()
    }
}

/// The 64-bit PCI window of a guest with `address_bits`: the top quarter of what it can address.
#[must_use]
pub fn pci_window_64(address_bits: u32) -> Range<u64> {
    let end = 1_u64 << address_bits.min(MAX_ADDRESS_BITS);
    end / 4 * 3..end
}

/// The part of the 64-bit PCI window that belongs to `segment` of `segments`.
///
/// The 32-bit window is not divided: it belongs to the first segment, for functions that can be
/// nowhere else.
#[must_use]
pub fn pci_window_64_of(segment: u16, segments: u16, address_bits: u32) -> Range<u64> {
    let all = pci_window_64(address_bits);
    // Powers of two, so that each part is as aligned as it is long.
    let len_bytes = (all.end - all.start) / u64::from(segments.next_power_of_two());
    let start = all.start + u64::from(segment) * len_bytes;
    start..start + len_bytes
}

/// The ECAM of `segment`, below [`MAX_PCI_SEGMENTS`].
#[must_use]
pub fn ecam(segment: u16) -> Range<u64> {
    let len_bytes = ECAM.end - ECAM.start;
    match u64::from(segment).checked_sub(1) {
        None => ECAM,
        Some(further) => {
            let start = FURTHER_ECAMS.start + further * len_bytes;
            start..start + len_bytes
        }
    }
}

/// The most RAM that fits below the 64-bit PCI window, in bytes.
#[must_use]
pub fn max_ram_bytes(address_bits: u32) -> u64 {
    pci_window_64(address_bits).start.saturating_sub(HIGH_RAM_START) + LOW_RAM_END
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn small_ram_is_all_below_the_hole() {
        let ram = Ram::of(512 << 20);
        assert_eq!(ram.low, 0..512 << 20);
        assert!(ram.high.is_empty());
        assert_eq!(ram.ranges().count(), 1);
    }

    #[test]
    fn large_ram_goes_on_at_4_gib() {
        let ram = Ram::of(8 * GIB);
        assert_eq!(ram.ranges().collect::<Vec<_>>(), [0..3 * GIB, 4 * GIB..9 * GIB]);
    }

    #[test]
    fn the_pci_window_is_the_top_quarter_and_caps_ram() {
        assert_eq!(pci_window_64(40), 768 * GIB..1024 * GIB);
        assert_eq!(pci_window_64(52), pci_window_64(46));
        assert_eq!(max_ram_bytes(40), 767 * GIB);
        assert!(Ram::of(max_ram_bytes(40)).high.end <= pci_window_64(40).start);
    }

    #[test]
    fn each_segment_has_its_own_ecam_and_an_equal_part_of_the_window() {
        assert_eq!(pci_window_64_of(0, 1, 40), pci_window_64(40));
        assert_eq!(ecam(MAX_PCI_SEGMENTS - 1).end, FURTHER_ECAMS.end);
        for segments in 2..=MAX_PCI_SEGMENTS {
            let windows: Vec<_> =
                (0..segments).map(|n| pci_window_64_of(n, segments, 40)).collect();
            assert!(windows.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!(windows[0].start, pci_window_64(40).start);
            assert!(windows[windows.len() - 1].end <= pci_window_64(40).end);
            assert!(windows.iter().all(|window| window.end - window.start >= 16 * GIB));
            let ecams: Vec<_> = (0..segments).map(ecam).collect();
            assert!(ecams.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }

    #[test]
    fn the_fixed_ranges_are_in_order_and_apart() {
        let ranges = [
            0..LOW_RAM_END,
            PCI_WINDOW_32,
            ECAM,
            EVENT_DEVICE,
            CPU_HOTPLUG,
            MEMORY_HOTPLUG,
            PCI_HOTPLUG,
            EVENT_REGISTERS.end..EVENT_REGISTERS.end,
            FURTHER_ECAMS,
            u64::from(IO_APIC)..u64::from(IO_APIC) + 0x1000,
            u64::from(LOCAL_APIC)..u64::from(LOCAL_APIC) + 0x1000,
            KVM_PAGES,
            HIGH_RAM_START..u64::MAX,
        ];
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
