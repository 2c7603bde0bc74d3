//! One run of a vCPU and the answer to its exit; how often each kind happens.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use nacre_proto::vmm::Exits;

use crate::{bus::Bus, sys};

/// Both address spaces.
#[derive(Clone, Debug)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Everything in the physical address space that is no RAM and not KVM's.
    pub mmio: Bus,
}

/// How often a vCPU left the guest for user space, by kind. Its thread counts, anyone reads.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// Port reads.
    pub pio_reads: AtomicU64,
    /// Port writes.
    pub pio_writes: AtomicU64,
    /// MMIO reads.
    pub mmio_reads: AtomicU64,
    /// MMIO writes.
    pub mmio_writes: AtomicU64,
    /// Signals, retries and halts.
    pub others: AtomicU64,
}

/// Several vCPUs' counts, added.
pub fn sum<'a>(all: impl Iterator<Item = &'a ExitCounts>) -> Exits {
    let mut sum = Exits::default();
    for counts in all {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        sum.pio_reads += get(&counts.pio_reads);
        sum.pio_writes += get(&counts.pio_writes);
        sum.mmio_reads += get(&counts.mmio_reads);
        sum.mmio_writes += get(&counts.mmio_writes);
        sum.others += get(&counts.others);
    }
    sum
}

/// What follows a run.
#[derive(Debug)]
pub enum After {
    /// Another run.
    Again,
    /// The run was interrupted: there may be an order.
    Interrupted,
    /// The guest can't go on.
    Crash(String),
    /// KVM failed it.
    Failed(kvm_ioctls::Error),
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Runs the guest until it leaves, and answers.
pub fn run(vcpu: &mut VcpuFd, buses: &Buses, counts: &ExitCounts) -> After {
    match vcpu.run() {
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&counts.mmio_reads);
            buses.mmio.read(address, data);
            After::Again
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&counts.mmio_writes);
            buses.mmio.write(address, data);
            After::Again
        }
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => access_port(vcpu, &buses.pio, counts),
        // With the interrupt controller in KVM a halt ends there; an exit for one is harmless.
        Ok(VcpuExit::Hlt) => {
            count(&counts.others);
            After::Again
        }
        Ok(VcpuExit::Intr) => After::Interrupted,
        Ok(VcpuExit::Shutdown) => After::Crash("triple fault".to_owned()),
        Ok(VcpuExit::InternalError) => After::Crash(internal_error(vcpu)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            After::Crash(format!("the processor refuses to enter the guest: {reason:#x} on {cpu}"))
        }
        Ok(exit) => After::Crash(format!("unexpected exit {exit:?}")),
        Err(error) => {
            count(&counts.others);
            match error.errno() {
                libc::EINTR => After::Interrupted,
                // A processor that another one just woke.
                libc::EAGAIN => After::Again,
                _ => After::Failed(error),
            }
        }
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    let suberror = sys::internal_suberror(vcpu);
    let meaning = match suberror {
        Some(1) => "KVM can't emulate an instruction",
        Some(2) => "two exceptions at once",
        Some(3) => "an exit while delivering an event",
        Some(4) => "an exit of an unknown reason",
        Some(_) | None => "unknown",
    };
    format!("KVM's internal error {suberror:?}: {meaning}")
}

fn access_port(vcpu: &mut VcpuFd, pio: &Bus, counts: &ExitCounts) -> After {
    let Some(access) = sys::port_access(vcpu) else {
        return After::Crash("a port access that can't be read".to_owned());
    };
    count(if access.is_read { &counts.pio_reads } else { &counts.pio_writes });
    let port = u64::from(access.port);
    for data in access.data.chunks_mut(access.size.max(1)) {
        if access.is_read {
            pio.read(port, data);
        } else {
            pio.write(port, data);
        }
    }
    After::Again
}

/// A vCPU's registers in words, for the log of a crash.
pub struct Registers<'a>(pub &'a VcpuFd);

impl fmt::Display for Registers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.get_regs() {
            Ok(r) => write!(
                f,
                "rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} \
                 rsi={:#x} rdi={:#x} rbp={:#x} r8={:#x} r9={:#x} r10={:#x} r11={:#x} r12={:#x} \
                 r13={:#x} r14={:#x} r15={:#x}",
                r.rip,
                r.rsp,
                r.rflags,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                r.rbp,
                r.r8,
                r.r9,
                r.r10,
                r.r11,
                r.r12,
                r.r13,
                r.r14,
                r.r15
            )?,
            Err(error) => write!(f, "no registers ({error})")?,
        }
        match self.0.get_sregs() {
            Ok(s) => write!(
                f,
                " cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} cs={:#x}:{:#x} ss={:#x} \
                 gdt={:#x} idt={:#x}",
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
                s.cs.selector,
                s.cs.base,
                s.ss.selector,
                s.gdt.base,
                s.idt.base
            ),
            Err(error) => write!(f, " no segments ({error})"),
        }
    }
}
