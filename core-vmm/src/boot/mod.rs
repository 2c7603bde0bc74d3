//! From a kernel file to a guest that is ready for its first instruction, without firmware.
//!
//! Files are opened once, at start; a reset reads them again. Two kinds of kernel: an ELF image
//! with a PVH entry (Linux's `vmlinux`), which needs no decompression, and a bzImage by the 64-bit
//! Linux boot protocol.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use linux_loader::loader::{self, bootparam::setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

mod bzimage;
mod memory_map;
mod pvh;
mod reset_vector;

use crate::{
    memory::{layout, region::GuestRam},
    vcpu::registers,
};

/// Where and how the boot processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The physical address of the first instruction.
    pub address: u64,
    /// 64-bit mode for the Linux protocol, else 32-bit protected mode for PVH.
    pub is_long_mode: bool,
}

/// Why a guest can't boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file can't be opened or read.
    #[error("can't {action} the {what} {}", path.display())]
    File {
        /// What failed.
        action: &'static str,
        /// Kernel or initramfs.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a regular file.
    #[error("the {what} {} is no regular file", path.display())]
    NoFile {
        /// Kernel or initramfs.
        what: &'static str,
        /// Which.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("the {what} {} is empty", path.display())]
    Empty {
        /// Kernel or initramfs.
        what: &'static str,
        /// Which.
        path: PathBuf,
    },
    /// Neither ELF nor bzImage.
    #[error("the kernel {} is neither an ELF image nor a bzImage", path.display())]
    UnknownKernel {
        /// Which.
        path: PathBuf,
    },
    /// An image that its own headers contradict, or that does not fit in memory.
    #[error("the kernel {} can't be loaded", path.display())]
    Kernel {
        /// Which.
        path: PathBuf,
        /// Why.
        source: loader::Error,
    },
    /// An ELF image without the PVH note.
    #[error("the kernel {} has no PVH entry (CONFIG_PVH)", path.display())]
    NoPvhEntry {
        /// Which.
        path: PathBuf,
    },
    /// A bzImage that is too old or for 32 bits.
    #[error("the kernel {} does not follow the 64-bit boot protocol 2.12", path.display())]
    OldProtocol {
        /// Which.
        path: PathBuf,
    },
    /// Kernel and initramfs don't fit below the PCI window.
    #[error("the initramfs {} of {bytes} bytes does not fit into memory beside the kernel", path.display())]
    NoRoom {
        /// The initramfs.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The command line is too long or has a zero byte in it.
    #[error("the command line of {0} bytes has a zero byte or is longer than {max}", max = layout::COMMAND_LINE_BYTES - 1)]
    CommandLine(usize),
    /// A place for boot data that is not in RAM: too little memory.
    #[error("boot data does not fit into guest memory")]
    Memory(#[from] GuestMemoryError),
}

impl BootError {
    /// Whether a file of the supervisor's is at fault.
    #[must_use]
    pub fn is_about_file(&self) -> bool {
        !matches!(self, Self::Memory(_) | Self::CommandLine(_))
    }
}

/// A file that is read into guest memory.
#[derive(Debug)]
struct Image {
    what: &'static str,
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// What the guest boots.
#[derive(Debug)]
pub struct BootSource {
    kernel: Image,
    initramfs: Option<Image>,
    command_line: Vec<u8>,
}

/// A loaded initramfs.
#[derive(Clone, Copy, Debug)]
struct Initramfs {
    start: u64,
    bytes: u64,
}

impl Image {
    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let path = path.to_owned();
        let failed = |source| BootError::File { action: "open", what, path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            Err(BootError::NoFile { what, path })
        } else if metadata.len() == 0 {
            Err(BootError::Empty { what, path })
        } else {
            Ok(Self { what, path, file, bytes: metadata.len() })
        }
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), BootError> {
        self.file.read_exact_at(bytes, offset).map_err(|source| self.failed_read(source))
    }

    fn failed_read(&self, source: io::Error) -> BootError {
        BootError::File { action: "read", what: self.what, path: self.path.clone(), source }
    }
}

impl BootSource {
    /// Opens the files and checks the command line.
    ///
    /// # Errors
    ///
    /// Fails if a file can't be opened or is empty, or the command line can't be passed on.
    pub fn open(
        kernel: &Path,
        initramfs: Option<&Path>,
        command_line: &str,
    ) -> Result<Self, BootError> {
        let command_line = command_line.as_bytes().to_vec();
        if command_line.contains(&0) || command_line.len() >= layout::COMMAND_LINE_BYTES {
            return Err(BootError::CommandLine(command_line.len()));
        }
        Ok(Self {
            kernel: Image::open("kernel", kernel)?,
            initramfs: initramfs.map(|path| Image::open("initramfs", path)).transpose()?,
            command_line,
        })
    }

    /// Loads kernel, initramfs and boot data into memory that is all zero; the ACPI tables, with
    /// the RSDP first at [`layout::ACPI_TABLES`], come from elsewhere.
    ///
    /// # Errors
    ///
    /// Fails if the images are not what they should be or don't fit.
    pub fn load(&self, ram: &GuestRam) -> Result<Entry, BootError> {
        let memory = &ram.memory;
        let mut magic = [0; 4];
        self.kernel.read_at(&mut magic, 0).map_err(|_error| self.unknown_kernel())?;
        let is_elf = magic == *b"\x7fELF";
        let kernel = if is_elf { pvh::load(self, ram)? } else { bzimage::load(self, ram)? };
        let initramfs = self.load_initramfs(ram, &kernel)?;
        memory.write_slice(&self.command_line, layout::COMMAND_LINE)?;
        memory.write_slice(&reset_vector::CODE, layout::RESET_VECTOR)?;
        for (index, descriptor) in (0..).zip(registers::gdt(!is_elf)) {
            memory.write_obj(descriptor, GuestAddress(layout::GDT.0 + index * 8))?;
        }
        if is_elf {
            pvh::write_start_info(ram, initramfs)?;
        } else {
            bzimage::write_zero_page(ram, &kernel, self.command_line.len(), initramfs)?;
            bzimage::write_page_tables(ram)?;
        }
        Ok(kernel.entry)
    }

    fn unknown_kernel(&self) -> BootError {
        BootError::UnknownKernel { path: self.kernel.path.clone() }
    }

    fn load_failed(&self, source: loader::Error) -> BootError {
        BootError::Kernel { path: self.kernel.path.clone(), source }
    }

    /// Puts the initramfs as high as the kernel takes it, out of the kernel's way.
    fn load_initramfs(
        &self,
        ram: &GuestRam,
        kernel: &Loaded,
    ) -> Result<Option<Initramfs>, BootError> {
        const PAGE_BYTES: u64 = 4096;
        let Some(image) = &self.initramfs else { return Ok(None) };
        let bytes = image.bytes;
        let no_room = || BootError::NoRoom { path: image.path.clone(), bytes };
        let top = ram.ram.low.end.min(kernel.initramfs_end);
        let start = top.checked_sub(bytes).ok_or_else(no_room)? / PAGE_BYTES * PAGE_BYTES;
        if start < kernel.end {
            return Err(no_room());
        }
        let len = usize::try_from(bytes).map_err(|_error| no_room())?;
        let mut file = &image.file;
        io::Seek::rewind(&mut file).map_err(|source| image.failed_read(source))?;
        ram.memory
            .read_exact_volatile_from(GuestAddress(start), &mut file, len)
            .map_err(|error| image.failed_read(io::Error::other(error)))?;
        Ok(Some(Initramfs { start, bytes }))
    }
}

/// A kernel in memory.
#[derive(Debug)]
struct Loaded {
    entry: Entry,
    /// The end of what it occupies until it has set up its own memory map.
    end: u64,
    /// The end of where it looks for an initramfs.
    initramfs_end: u64,
    /// A bzImage's own header.
    setup_header: Option<setup_header>,
}
