//! What this machine's `/dev/kvm` can do, found by running a few instructions in it.
//!
//! A software KVM can be opened and creates virtual machines, yet stops at instructions that it
//! does not emulate. The probe's guest starts in long mode (real mode would itself be emulated on
//! old processors) and reports by port writes how far it came; no timing is judged.

use crate::sys::give_memory;
use anyhow::{Result, bail};
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::fmt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What `/dev/kvm` is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmClass {
    /// There is none.
    Absent,
    /// This user may not open it.
    NoPermission,
    /// It opens, and fails where no KVM should.
    Broken(String),
    /// It runs simple code, and stops at an instruction that every Linux kernel uses.
    Emulating {
        /// The instruction.
        stops_at: &'static str,
    },
    /// It runs a Linux kernel.
    Full,
}

impl fmt::Display for KvmClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => write!(f, "no /dev/kvm"),
            Self::NoPermission => write!(f, "no permission for /dev/kvm"),
            Self::Broken(reason) => write!(f, "/dev/kvm is broken: {reason}"),
            Self::Emulating { stops_at } => {
                write!(f, "/dev/kvm is a software one that stops at {stops_at}")
            }
            Self::Full => write!(f, "/dev/kvm is full"),
        }
    }
}

const MEMORY_BYTES: usize = 0x10000;
const CODE: u64 = 0x2000;
const HANDLER: u64 = 0x2100;
const PAGE_TABLES: u64 = 0x4000;
const GDT: u64 = 0x7000;
const IDT: u64 = 0x8000;
const STACK: u64 = 0xf000;

const PORT_BASIC: u16 = 0x81;
const PORT_SSE: u16 = 0x82;
const PORT_CMPXCHG16B: u16 = 0x83;
const PORT_INT3: u16 = 0x84;

/// Each port write says that what stands before it worked.
const PROGRAM: &[u8] = &[
    0xb0, 0x01, 0xe6, 0x81, // mov al, 1; out 0x81, al
    0x66, 0x0f, 0xef, 0xc0, 0xe6, 0x82, // pxor xmm0, xmm0; out 0x82, al
    0x48, 0xbf, 0x00, 0x30, 0, 0, 0, 0, 0, 0, // mov rdi, 0x3000
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xe6, 0x83, // lock cmpxchg16b [rdi]; out 0x83, al
    0xcc, 0xe6, 0x84, 0xf4, // int3; out 0x84, al; hlt
];
const IRETQ: &[u8] = &[0x48, 0xcf];

/// Classifies `/dev/kvm`. Takes about 2 ms, on an emulated host about 100 ms.
pub fn probe() -> KvmClass {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) if is_refusal(error.errno()) => return KvmClass::NoPermission,
        Err(_) => return KvmClass::Absent,
    };
    if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
        return KvmClass::Absent;
    }
    run(&kvm).unwrap_or_else(|error| KvmClass::Broken(format!("{error:#}")))
}

fn is_refusal(errno: i32) -> bool {
    errno == libc::EACCES || errno == libc::EPERM
}

fn run(kvm: &Kvm) -> Result<KvmClass> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?;
    fill(&memory)?;
    let vm = kvm.create_vm()?;
    give_memory(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_long_mode(&vcpu)?;
    let mut reached = 0;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT_INT3, _)) => return Ok(KvmClass::Full),
            Ok(VcpuExit::IoOut(port, _)) => reached = port,
            Ok(VcpuExit::InternalError) => {
                let stops_at = match reached {
                    PORT_BASIC => "SSE (pxor)",
                    PORT_SSE => "cmpxchg16b",
                    PORT_CMPXCHG16B => "int3",
                    _ => bail!("the first instruction does not run"),
                };
                return Ok(KvmClass::Emulating { stops_at });
            }
            Ok(exit) => bail!("unexpected exit {exit:?} after port {reached:#x}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn fill(memory: &GuestMemoryMmap) -> Result<()> {
    let words = [
        // One 2 MiB page, identity mapped, of which 64 KiB are memory.
        (PAGE_TABLES, PAGE_TABLES + 0x1003),
        (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2003),
        (PAGE_TABLES + 0x2000, 0x83),
        // 64-bit code and flat data.
        (GDT + 8, 0x00af_9b00_0000_ffff),
        (GDT + 16, 0x00cf_9300_0000_ffff),
        // The gate of int3.
        (IDT + 3 * 16, 0x0000_8e00_0008_0000 | HANDLER),
        (IDT + 3 * 16 + 8, 0),
    ];
    for (address, word) in words {
        memory.write_obj(word, GuestAddress(address))?;
    }
    memory.write_slice(PROGRAM, GuestAddress(CODE))?;
    memory.write_slice(IRETQ, GuestAddress(HANDLER))?;
    Ok(())
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<()> {
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
    let data = kvm_segment { selector: 0x10, type_: 3, db: 1, ..flat };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x17);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0x3f);
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
    sregs.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    sregs.efer = 0x500; // LME, LMA
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..kvm_regs::default() })?;
    Ok(())
}
