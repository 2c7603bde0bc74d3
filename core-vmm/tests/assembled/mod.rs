//! A guest assembled by hand, instruction by instruction, as a PVH ELF image.
//!
//! It runs in 32-bit protected mode with flat segments and no stack, as PVH enters it, and needs
//! nothing but port I/O, so that an emulating KVM is good enough.

use std::{fs, path::Path};

/// Where the code is loaded and entered.
const LOAD_ADDRESS: u32 = 0x10_0000;
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const NOTE_OFFSET: usize = ELF_HEADER_BYTES + 2 * PROGRAM_HEADER_BYTES;
const NOTE_BYTES: usize = 20;
const CODE_OFFSET: usize = NOTE_OFFSET + NOTE_BYTES;
const XEN_ENTRY_NOTE: u32 = 18;

/// A guest's code.
#[derive(Default)]
pub(crate) struct Guest {
    code: Vec<u8>,
}

impl Guest {
    /// A guest that does nothing yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds instructions.
    pub(crate) fn code(mut self, bytes: &[u8]) -> Self {
        self.code.extend_from_slice(bytes);
        self
    }

    /// `mov dx, port`
    fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.code(&[0x66, 0xba, low, high])
    }

    /// Writes a byte to a port.
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        self.port(port).code(&[0xb0, value, 0xee])
    }

    /// Prints a text on the serial port, one instruction a byte.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |guest, byte| guest.out(0x3f8, byte))
    }

    /// Prints the code's own first bytes with one string instruction.
    pub(crate) fn print_own_code(self, count: u32) -> Self {
        self.port(0x3f8)
            .code(&[0xbe])
            .code(&LOAD_ADDRESS.to_le_bytes())
            .code(&[0xb9])
            .code(&count.to_le_bytes())
            .code(&[0xfc, 0xf3, 0x6e])
    }

    /// Prints what a CMOS register reads.
    pub(crate) fn print_cmos(self, register: u8) -> Self {
        self.out(0x70, register).code(&[0xe4, 0x71]).port(0x3f8).code(&[0xee])
    }

    /// Prints what a port reads.
    pub(crate) fn print_port(self, port: u16) -> Self {
        self.port(port).code(&[0xec]).port(0x3f8).code(&[0xee])
    }

    /// Waits until the byte at a physical address is not zero, and prints it.
    pub(crate) fn print_when_set(self, address: u32) -> Self {
        // l: mov al, [address]; test al, al; jz l
        self.code(&[0xa0])
            .code(&address.to_le_bytes())
            .code(&[0x84, 0xc0, 0x74, 0xf7])
            .port(0x3f8)
            .code(&[0xee])
    }

    /// Powers off by the sleep control register.
    pub(crate) fn power_off(self) -> Self {
        self.out(0x600, 0x34).spin()
    }

    /// Loops for ever.
    pub(crate) fn spin(self) -> Self {
        self.code(&[0xeb, 0xfe])
    }

    /// Writes the image.
    pub(crate) fn write(&self, path: &Path) {
        let code_bytes = u64::try_from(self.code.len()).unwrap();
        let mut image = elf_header();
        image.extend(program_header(1, CODE_OFFSET, LOAD_ADDRESS, code_bytes));
        image.extend(program_header(4, NOTE_OFFSET, 0, NOTE_BYTES as u64));
        for word in [4, 4, XEN_ENTRY_NOTE, u32::from_le_bytes(*b"Xen\0"), LOAD_ADDRESS] {
            image.extend(word.to_le_bytes());
        }
        image.extend(&self.code);
        fs::write(path, image).unwrap();
    }
}

fn elf_header() -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    header.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    header.extend(u64::from(LOAD_ADDRESS).to_le_bytes());
    header.extend((ELF_HEADER_BYTES as u64).to_le_bytes());
    header.extend([0; 12]);
    for half in [ELF_HEADER_BYTES, PROGRAM_HEADER_BYTES, 2, 0, 0, 0] {
        header.extend(u16::try_from(half).unwrap().to_le_bytes());
    }
    header
}

fn program_header(kind: u32, offset: usize, address: u32, bytes: u64) -> Vec<u8> {
    const READ_EXECUTE: u32 = 5;
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    header.extend(READ_EXECUTE.to_le_bytes());
    for word in [offset as u64, address.into(), address.into(), bytes, bytes, 1] {
        header.extend(word.to_le_bytes());
    }
    header
}
