//! PVH: an ELF image entered in 32-bit protected mode with a start-info structure in `ebx`.
//!
//! Xen's public headers (`arch-x86/hvm/start_info.h`) are the specification.

use linux_loader::loader::{
    Elf, KernelLoader,
    elf::{
        PvhBootCapability,
        start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{BootError, BootSource, Entry, Initramfs, Loaded, memory_map};
use crate::memory::{layout, region::GuestRam};

const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;

/// Where the module list stands in [`layout::PVH_TABLES`]: behind the memory map.
const MODULE_LIST: GuestAddress = GuestAddress(layout::PVH_TABLES.0 + 0x800);

/// Loads the image where its headers say.
pub(super) fn load(source: &BootSource, ram: &GuestRam) -> Result<Loaded, BootError> {
    let mut file = &source.kernel.file;
    let kernel_start = Some(GuestAddress(layout::KERNEL_START));
    let loaded = Elf::load(&ram.memory, None, &mut file, kernel_start)
        .map_err(|error| source.load_failed(error))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry { path: source.kernel.path.clone() });
    };
    Ok(Loaded {
        entry: Entry { address: entry.0, is_long_mode: false },
        end: loaded.kernel_end,
        initramfs_end: layout::LOW_RAM_END,
        setup_header: None,
    })
}

/// Writes the start info and what it points to.
pub(super) fn write_start_info(
    ram: &GuestRam,
    initramfs: Option<Initramfs>,
) -> Result<(), GuestMemoryError> {
    let memory = &ram.memory;
    let map = memory_map::entries(&ram.ram);
    let mut address = layout::PVH_TABLES.0;
    let mut memmap_entries = 0;
    for (range, kind) in map {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: kind as u32,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(address))?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
        memmap_entries += 1;
    }
    if let Some(initramfs) = initramfs {
        let module = hvm_modlist_entry {
            paddr: initramfs.start,
            size: initramfs.bytes,
            ..Default::default()
        };
        memory.write_obj(module, MODULE_LIST)?;
    }
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: initramfs.map_or(0, |_initramfs| MODULE_LIST.0),
        cmdline_paddr: layout::COMMAND_LINE.0,
        rsdp_paddr: layout::ACPI_TABLES.start,
        memmap_paddr: layout::PVH_TABLES.0,
        memmap_entries,
        ..Default::default()
    };
    memory.write_obj(start_info, layout::START_INFO)
}
