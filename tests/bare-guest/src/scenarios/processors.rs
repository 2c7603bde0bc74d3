//! Application processors: those that are there from the start, and those that come and go.

use core::sync::atomic::Ordering;

use crate::acpi::{self, Table};
use crate::machine::{
    self, LAST_ID, PROCESSORS, rdmsr, read8, read32, write8, write16, write32, wrmsr,
};
use crate::say;

/// Where an application processor begins in real mode; 4 KiB page 8.
const TRAMPOLINE: u64 = 0x8000;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4608;

const MSR_APIC_BASE: u32 = 0x1b;
const X2APIC_MODE: u64 = 1 << 10;
const MSR_X2APIC_COMMAND: u32 = 0x830;

/// The event device's byte and its bit for vCPUs.
const EVENTS: u64 = 0xe810_0000;
const CPUS: u8 = 1 << 1;
/// The controller of vCPUs.
const REGISTERS: u64 = 0xe810_0100;
const SELECT: u64 = REGISTERS;
const STATUS: u64 = REGISTERS + 4;
const NEXT: u64 = REGISTERS + 8;
const OST_EVENT: u64 = REGISTERS + 0xc;
const OST_OUTCOME: u64 = REGISTERS + 0x10;
const POSSIBLE: u64 = REGISTERS + 0x14;
const IS_THERE: u32 = 1;
const CAME: u32 = 2;
const IS_TO_GO: u32 = 4;
const EJECT: u32 = 8;
const NONE: u32 = u32::MAX;
/// `_OST`: device check and eject request; success and busy.
const DEVICE_CHECK: u32 = 1;
const EJECT_REQUEST: u32 = 3;
const SUCCESS: u32 = 0;
const BUSY: u32 = 0x82;

fn place_trampoline() {
    unsafe extern "C" {
        static trampoline_start: u8;
        static trampoline_end: u8;
    }
    let (start, end) = (&raw const trampoline_start as u64, &raw const trampoline_end as u64);
    for (at, byte) in (TRAMPOLINE..).zip(machine::bytes(start, (end - start) as usize)) {
        write8(at, *byte);
    }
}

fn is_x2apic() -> bool {
    rdmsr(MSR_APIC_BASE) & X2APIC_MODE != 0
}

/// Starts the processor with this id, and waits until it answers.
fn start(id: u32) {
    let before = PROCESSORS.load(Ordering::Acquire);
    let in_x2apic_mode = is_x2apic();
    for command in [INIT, STARTUP] {
        if in_x2apic_mode {
            wrmsr(MSR_X2APIC_COMMAND, u64::from(id) << 32 | u64::from(command));
        } else {
            write32(0xfee0_0310, id << 24);
            write32(0xfee0_0300, command);
        }
    }
    while PROCESSORS.load(Ordering::Acquire) == before {
        core::hint::spin_loop();
    }
    assert!(!in_x2apic_mode || LAST_ID.load(Ordering::Acquire) == id, "another one than {id} came");
}

/// Every processor in the MADT starts by INIT and SIPI.
pub fn all(tables: &[Table]) {
    place_trampoline();
    let madt = tables.iter().find(|table| &table.signature == b"APIC").expect("a MADT");
    for id in acpi::processors(madt.address).filter(|id| *id != 0) {
        start(id);
    }
    say!("last={}", LAST_ID.load(Ordering::Acquire));
    say!("processors={}", PROCESSORS.load(Ordering::Acquire) + 1);
}

fn status_of(index: u32) -> u32 {
    write32(SELECT, index);
    read32(STATUS)
}

fn tell(event: u32, outcome: u32) {
    write32(OST_EVENT, event);
    write32(OST_OUTCOME, outcome);
}

/// What no driver does: the controller takes none of it.
fn nonsense() {
    for index in [0, 1, read32(POSSIBLE), NONE] {
        write32(SELECT, index);
        write32(STATUS, EJECT | CAME | IS_TO_GO);
        tell(EJECT_REQUEST, BUSY);
        tell(DEVICE_CHECK, BUSY);
    }
    for at in REGISTERS..REGISTERS + 0x40 {
        write8(at, 0xff);
        let _ = read8(at);
    }
    for at in (REGISTERS..REGISTERS + 0x40).step_by(2) {
        write16(at, 0xffff);
    }
    assert_eq!(status_of(0), IS_THERE);
    assert_eq!(status_of(NONE), 0);
}

/// Waits until the event device tells of vCPUs.
fn wait_for_event() {
    while read8(EVENTS) & CPUS == 0 {
        core::hint::spin_loop();
    }
}

/// Starts what comes and ejects what is to go, until so many did either. The first `refusals` that
/// are to go are kept.
pub fn come_and_go(events: u32, mut refusals: u32) {
    place_trampoline();
    nonsense();
    say!("possible={}", read32(POSSIBLE));
    let mut done = 0;
    while done < events {
        wait_for_event();
        loop {
            let index = read32(NEXT);
            if index == NONE {
                break;
            }
            let status = status_of(index);
            assert_ne!(status & IS_THERE, 0, "vCPU {index} is there");
            write32(STATUS, status & (CAME | IS_TO_GO));
            if status & CAME != 0 {
                start(index);
                write32(SELECT, index);
                tell(DEVICE_CHECK, SUCCESS);
                say!("came={index}");
                done += 1;
            } else if refusals > 0 {
                refusals -= 1;
                tell(EJECT_REQUEST, BUSY);
                say!("kept={index}");
            } else {
                write32(STATUS, EJECT);
                // Gone at once, or come again.
                assert!(matches!(status_of(index) & (IS_THERE | CAME), 0 | 3), "{index} stays");
                tell(EJECT_REQUEST, SUCCESS);
                say!("ejected={index}");
                done += 1;
            }
        }
    }
    nonsense();
}
