//! A bzImage by the 64-bit Linux boot protocol: entered in long mode, 512 bytes into the image,
//! with the zero page in `rsi`.
//!
//! The specification is `Documentation/arch/x86/boot.rst` in Linux.

use linux_loader::loader::{
    BzImage, KernelLoader,
    bootparam::{boot_e820_entry, boot_params},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{BootError, BootSource, Entry, Initramfs, Loaded, memory_map};
use crate::memory::{layout, region::GuestRam};

const HEADER_MAGIC_OFFSET: u64 = 0x202;
const ENTRY_OFFSET: u64 = 0x200;
const PROTOCOL_2_12: u16 = 0x20c;
const HAS_64_BIT_ENTRY: u16 = 1;
const LOADER_UNDEFINED: u8 = 0xff;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const PAGE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const TABLE_ENTRIES: u64 = 512;
const MAPPED_GIB: u64 = 4;

/// Loads the protected-mode part to 1 MiB.
pub(super) fn load(source: &BootSource, ram: &GuestRam) -> Result<Loaded, BootError> {
    let mut magic = [0; 4];
    source
        .kernel
        .read_at(&mut magic, HEADER_MAGIC_OFFSET)
        .map_err(|_error| source.unknown_kernel())?;
    if magic != *b"HdrS" {
        return Err(source.unknown_kernel());
    }
    let mut file = &source.kernel.file;
    let start = GuestAddress(layout::KERNEL_START);
    let loaded = BzImage::load(&ram.memory, Some(start), &mut file, Some(start))
        .map_err(|error| source.load_failed(error))?;
    let old_protocol = || BootError::OldProtocol { path: source.kernel.path.clone() };
    let header = loaded.setup_header.ok_or_else(old_protocol)?;
    if header.version < PROTOCOL_2_12 || header.xloadflags & HAS_64_BIT_ENTRY == 0 {
        return Err(old_protocol());
    }
    // It unpacks itself from where it prefers to be.
    let unpacked = u64::from(header.kernel_alignment)
        .max(header.pref_address)
        .checked_add(u64::from(header.init_size))
        .ok_or_else(|| source.unknown_kernel())?;
    Ok(Loaded {
        entry: Entry { address: start.0 + ENTRY_OFFSET, is_long_mode: true },
        end: loaded.kernel_end.max(unpacked),
        initramfs_end: u64::from(header.initrd_addr_max) + 1,
        setup_header: Some(header),
    })
}

/// Writes the zero page: the image's header with what the loader adds, and the memory map.
pub(super) fn write_zero_page(
    ram: &GuestRam,
    kernel: &Loaded,
    command_line_bytes: usize,
    initramfs: Option<Initramfs>,
) -> Result<(), GuestMemoryError> {
    // Everything here was placed below 4 GiB.
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let mut page =
        boot_params { hdr: kernel.setup_header.unwrap_or_default(), ..Default::default() };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low(layout::COMMAND_LINE.0);
    page.hdr.cmdline_size = low(command_line_bytes as u64);
    if let Some(initramfs) = initramfs {
        page.hdr.ramdisk_image = low(initramfs.start);
        page.hdr.ramdisk_size = low(initramfs.bytes);
    }
    page.acpi_rsdp_addr = layout::ACPI_TABLES.start;
    for (entry, (range, kind)) in page.e820_table.iter_mut().zip(memory_map::entries(&ram.ram)) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: kind as u32,
        };
        page.e820_entries += 1;
    }
    ram.memory.write_obj(page, layout::ZERO_PAGE)
}

/// Writes page tables that map the first 4 GiB to themselves in large pages.
pub(super) fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let top = layout::PAGE_TABLES.0;
    let pointers = top + PAGE_BYTES;
    let directories = pointers + PAGE_BYTES;
    ram.memory.write_obj(pointers | PAGE_PRESENT_WRITABLE, GuestAddress(top))?;
    for gib in 0..MAPPED_GIB {
        let directory = directories + gib * PAGE_BYTES;
        let pointer = GuestAddress(pointers + gib * 8);
        ram.memory.write_obj(directory | PAGE_PRESENT_WRITABLE, pointer)?;
    }
    for page in 0..MAPPED_GIB * TABLE_ENTRIES {
        let entry = (page * LARGE_PAGE_BYTES) | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
        ram.memory.write_obj(entry, GuestAddress(directories + page * 8))?;
    }
    Ok(())
}
