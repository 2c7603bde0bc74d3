//! The machine below Rust: ports, memory-mapped registers, the two services of ring 0, the serial
//! port, and the functions that a compiler expects of a C library.

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

global_asm!(include_str!("boot.s"));

/// How often each interrupt vector fired.
#[unsafe(no_mangle)]
static INTERRUPTS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

/// How many application processors reached 64-bit mode.
#[unsafe(no_mangle)]
pub static PROCESSORS: AtomicU64 = AtomicU64::new(0);

/// The x2APIC id of the application processor that came last, if it is in that mode.
#[unsafe(no_mangle)]
pub static LAST_ID: AtomicU32 = AtomicU32::new(0);

/// How often `vector` fired.
pub fn interrupts(vector: u8) -> u64 {
    INTERRUPTS[usize::from(vector)].load(Ordering::Acquire)
}

pub fn outb(port: u16, value: u8) {
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) }
}

pub fn outl(port: u16, value: u32) {
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) }
}

pub fn inb(port: u16) -> u8 {
    let value: u8;
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) }
    value
}

pub fn inl(port: u16) -> u32 {
    let value: u32;
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value) }
    value
}

/// Masks the two PICs, which would deliver the event device's interrupt as an exception.
pub fn mask_legacy_interrupts() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

pub fn read8(address: u64) -> u8 {
    unsafe { (address as *const u8).read_volatile() }
}

pub fn read16(address: u64) -> u16 {
    unsafe { (address as *const u16).read_unaligned() }
}

pub fn read32(address: u64) -> u32 {
    unsafe { (address as *const u32).read_volatile() }
}

pub fn read64(address: u64) -> u64 {
    unsafe { (address as *const u64).read_unaligned() }
}

pub fn write16(address: u64, value: u16) {
    unsafe { (address as *mut u16).write_volatile(value) }
}

pub fn write8(address: u64, value: u8) {
    unsafe { (address as *mut u8).write_volatile(value) }
}

pub fn write32(address: u64, value: u32) {
    unsafe { (address as *mut u32).write_volatile(value) }
}

pub fn write64(address: u64, value: u64) {
    unsafe { (address as *mut u64).write_volatile(value) }
}

/// Keeps the old interrupt controller from interrupting with the exceptions' numbers.
pub fn mask_pic() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

/// The guest's bytes at `address`.
pub fn bytes(address: u64, len: usize) -> &'static [u8] {
    unsafe { core::slice::from_raw_parts(address as *const u8, len) }
}

/// CPUID as ring 0 sees it: `[eax, ebx, ecx, edx]`. A software KVM lets ring 3 read the machine's.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut result = [0_u32; 4];
    unsafe {
        asm!("int3", inout("rax") 1_u64 => _, in("edi") leaf, in("esi") subleaf,
            inout("rdx") result.as_mut_ptr() => _, out("rcx") _, out("r9") _)
    }
    result
}

/// The value of a model-specific register.
pub fn rdmsr(register: u32) -> u64 {
    let value: u64;
    unsafe {
        asm!("int3", inout("rax") 3_u64 => value, in("edi") register, out("rcx") _, out("rdx") _)
    }
    value
}

/// Sets a model-specific register.
pub fn wrmsr(register: u32, value: u64) {
    unsafe {
        asm!("int3", inout("rax") 4_u64 => _, in("edi") register, in("rsi") value, out("rcx") _,
            out("rdx") _)
    }
}

/// Halts until an interrupt came.
pub fn wait_for_interrupt() {
    unsafe { asm!("int3", in("rax") 2_u64) }
}

/// The serial port at 0x3f8.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| outb(0x3f8, byte));
        Ok(())
    }
}

/// A line on the serial port.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        writeln!($crate::machine::Serial, $($argument)*).expect("the port takes everything")
    }};
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAIL {info}");
    crate::acpi::power_off()
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _)
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") len => _) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr() <= from.addr() || to.addr() >= from.addr() + len {
        return unsafe { memcpy(to, from, len) };
    }
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(len).wrapping_sub(1) => _,
            inout("rsi") from.add(len).wrapping_sub(1) => _, inout("rcx") len => _)
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    for index in 0..len {
        let (a, b) = unsafe { (left.add(index).read(), right.add(index).read()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    unsafe { memcmp(left, right, len) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    while unsafe { text.add(len).read() } != 0 {
        len += 1;
    }
    len
}
