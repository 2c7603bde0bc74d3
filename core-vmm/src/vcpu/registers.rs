//! The state in which a vCPU starts: the boot processor at the kernel's entry, the others waiting
//! for it; and how all of them come back to that state on a reset.
//!
//! A vCPU can't be made anew in one VM, so a reset restores what KVM gave it at its creation.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_fpu,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use crate::{boot::Entry, memory::layout};

/// Why a vCPU's state could not be read or set.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} a vCPU's {what}")]
pub struct RegisterError {
    action: &'static str,
    what: &'static str,
    source: kvm_ioctls::Error,
}

fn failed(
    action: &'static str,
    what: &'static str,
) -> impl FnOnce(kvm_ioctls::Error) -> RegisterError {
    move |source| RegisterError { action, what, source }
}

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_EXTENSION: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 8 | 1 << 10;

const MSR_TSC: u32 = 0x10;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// MTRRs on, all memory write-back unless page attributes say otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_BASE_X2APIC: u64 = 1 << 10;

const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVERY_EXTERNAL: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;

/// Selectors as Linux's boot protocol wants them; the table itself is [`gdt`].
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// The boot processor's segment descriptors, for [`layout::GDT`].
#[must_use]
pub fn gdt(is_long: bool) -> [u64; 5] {
    let code = if is_long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}

fn segment(selector: u16, type_: u8, is_code: bool, is_long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!(is_code && is_long)),
        s: 1,
        l: u8::from(is_code && is_long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// What KVM gave a vCPU when it was made, CPUID set.
pub struct ResetState {
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    xcrs: Option<kvm_xcrs>,
    msrs: Vec<kvm_msr_entry>,
}

impl ResetState {
    /// Reads it from a vCPU that never ran; `msr_indexes` are all that KVM saves.
    ///
    /// # Errors
    ///
    /// Fails if KVM does not tell.
    pub fn capture(vcpu: &VcpuFd, msr_indexes: &[u32]) -> Result<Self, RegisterError> {
        Ok(Self {
            sregs: vcpu.get_sregs().map_err(failed("read", "segments"))?,
            fpu: vcpu.get_fpu().map_err(failed("read", "floating-point state"))?,
            lapic: vcpu.get_lapic().map_err(failed("read", "local APIC"))?,
            events: vcpu.get_vcpu_events().map_err(failed("read", "pending events"))?,
            debug: vcpu.get_debug_regs().map_err(failed("read", "debug registers"))?,
            // Hosts without XSAVE have none.
            xcrs: vcpu.get_xcrs().ok(),
            msrs: read_msrs(vcpu, msr_indexes)?,
        })
    }

    /// Puts the vCPU back into it.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses a part that it gave itself.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), RegisterError> {
        vcpu.set_sregs(&self.sregs).map_err(failed("reset", "segments"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(failed("reset", "extended control registers"))?;
        }
        vcpu.set_fpu(&self.fpu).map_err(failed("reset", "floating-point state"))?;
        write_msrs(vcpu, &self.msrs);
        vcpu.set_lapic(&self.lapic).map_err(failed("reset", "local APIC"))?;
        vcpu.set_debug_regs(&self.debug).map_err(failed("reset", "debug registers"))?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("reset", "pending events"))
    }
}

/// Reads those of the MSRs that this vCPU has: KVM's list is of the host's.
fn read_msrs(vcpu: &VcpuFd, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>, RegisterError> {
    let mut known = Vec::with_capacity(indexes.len());
    let mut rest = indexes;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest
            .iter()
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let mut msrs = Msrs::from_entries(&wanted)
            .map_err(|_error| failed("read", "MSRs")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(failed("read", "MSRs"))?;
        known.extend_from_slice(&msrs.as_slice()[..count]);
        // KVM stops at the first one that it can't read.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    for msr in &mut known {
        // Zero, written by the host, makes KVM start the counters of all vCPUs together.
        if msr.index == MSR_TSC {
            msr.data = 0;
        }
    }
    Ok(known)
}

/// Writes the MSRs; read-only ones among them keep their value, which is what they had.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) {
    let mut rest = entries;
    while !rest.is_empty() {
        let count = Msrs::from_entries(rest)
            .ok()
            .and_then(|msrs| vcpu.set_msrs(&msrs).ok())
            .unwrap_or_default();
        if let Some(refused) = rest.get(count) {
            log::debug!("MSR {:#x} keeps its value on a reset", refused.index);
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
}

/// Puts the local APIC of a vCPU that never ran into x2APIC mode, as firmware leaves it on a machine
/// with ids of more than eight bits (Intel's x2APIC specification, 2.7): the other mode can't tell
/// them apart, and a kernel that finds it ignores them.
///
/// # Errors
///
/// Fails if KVM refuses it.
pub fn enable_x2apic(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("read", "segments"))?;
    sregs.apic_base |= APIC_BASE_X2APIC;
    vcpu.set_sregs(&sregs).map_err(failed("set", "APIC mode"))
}

/// Makes a vCPU that is in its reset state ready for its first instruction.
///
/// The boot processor, with the `entry` that the kernel's image gave, begins there; the others
/// wait for it to wake them.
///
/// # Errors
///
/// Fails if KVM refuses a part.
pub fn prepare(vcpu: &VcpuFd, entry: Option<&Entry>) -> Result<(), RegisterError> {
    let msrs = [
        kvm_msr_entry {
            index: MSR_MISC_ENABLE,
            data: MISC_ENABLE_FAST_STRINGS,
            ..Default::default()
        },
        kvm_msr_entry { index: MSR_MTRR_DEFAULT, data: MTRR_WRITE_BACK, ..Default::default() },
    ];
    write_msrs(vcpu, &msrs);
    connect_interrupt_pins(vcpu)?;
    if let Some(entry) = entry {
        enter_kernel(vcpu, entry)?;
    }
    let mp_state = if entry.is_some() { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
    vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(failed("set", "run state"))
}

/// Sets the local interrupt pins as firmware would: LINT0 from the PIC, LINT1 for the NMI.
fn connect_interrupt_pins(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let mut lapic = vcpu.get_lapic().map_err(failed("read", "local APIC"))?;
    for (register, mode) in [(LAPIC_LINT0, DELIVERY_EXTERNAL), (LAPIC_LINT1, DELIVERY_NMI)] {
        for (byte, value) in lapic.regs[register..].iter_mut().zip(mode.to_le_bytes()) {
            *byte = i8::from_ne_bytes([value]);
        }
    }
    vcpu.set_lapic(&lapic).map_err(failed("set", "local APIC"))
}

/// Flat segments, and 32-bit protected mode without paging for PVH, or long mode with the
/// identity tables at [`layout::PAGE_TABLES`] for the 64-bit Linux protocol.
fn enter_kernel(vcpu: &VcpuFd, entry: &Entry) -> Result<(), RegisterError> {
    let is_long = entry.is_long_mode;
    let mut sregs = vcpu.get_sregs().map_err(failed("read", "segments"))?;
    sregs.cs = segment(CODE_SELECTOR, 0xb, true, is_long);
    let data = segment(DATA_SELECTOR, 0x3, false, is_long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.cr4 = 0;
    if is_long {
        sregs.cr0 |= CR0_PAGING;
        sregs.cr3 = layout::PAGE_TABLES.0;
        sregs.cr4 = CR4_PHYSICAL_EXTENSION;
        sregs.efer |= EFER_LONG;
    }
    vcpu.set_sregs(&sregs).map_err(failed("set", "segments"))?;
    let regs = kvm_regs {
        rip: entry.address,
        rbx: if is_long { 0 } else { layout::START_INFO.0 },
        rsi: if is_long { layout::ZERO_PAGE.0 } else { 0 },
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("set", "registers"))
}
