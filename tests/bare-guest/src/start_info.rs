//! What the VMM tells by the PVH start info (Xen `hvm_start_info`, version 1).

use crate::machine::{bytes, read32, read64};

const MAGIC: u32 = 0x336e_c578;

/// The start info, read where the VMM left it.
#[derive(Clone, Copy)]
pub struct StartInfo(u64);

/// One entry of the memory map.
pub struct MemoryRange {
    pub address: u64,
    pub len: u64,
    /// 1 is RAM, as in E820.
    pub kind: u32,
}

impl StartInfo {
    pub fn at(address: u64) -> Self {
        assert_eq!(read32(address), MAGIC, "no PVH start info at {address:#x}");
        assert!(read32(address + 4) >= 1, "start info without a memory map");
        Self(address)
    }

    pub fn command_line(self) -> &'static str {
        let address = read64(self.0 + 24);
        let len = (0..4096).find(|at| bytes(address, 4096)[*at] == 0).unwrap_or(4096);
        core::str::from_utf8(bytes(address, len)).expect("the command line is text")
    }

    /// The number that the command line gives as `key=number`.
    pub fn number(self, key: &str) -> u32 {
        let words = self.command_line().split_whitespace();
        let value = words.filter_map(|word| word.split_once('=')).find(|(name, _)| *name == key);
        value.and_then(|(_, value)| value.parse().ok()).expect("a number on the command line")
    }

    pub fn rsdp(self) -> u64 {
        read64(self.0 + 32)
    }

    pub fn memory_map(self) -> impl Iterator<Item = MemoryRange> {
        let (table, entries) = (read64(self.0 + 40), read32(self.0 + 48));
        (0..u64::from(entries)).map(move |entry| {
            let at = table + entry * 24;
            MemoryRange { address: read64(at), len: read64(at + 8), kind: read32(at + 16) }
        })
    }
}
