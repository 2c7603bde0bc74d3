//! What this guest can try, each by its name on the command line.

mod blk;
mod board;
mod hotplug;
mod memory;
mod net;
mod processors;
mod storm;
mod vsock;

use crate::acpi::{self, Table};
use crate::load;
use crate::machine::inb;
use crate::start_info::StartInfo;

/// Runs one scenario; a failure panics, and the panic is reported.
pub fn run(name: &str, info: StartInfo, tables: &[Table]) {
    match name {
        "hello" => {}
        "spin" => loop {
            core::hint::spin_loop();
        },
        "memory" => board::memory(info),
        "acpi" => board::acpi(tables),
        "pci" => board::pci(tables),
        "cpuid" => board::cpuid(),
        "clock" => board::clock(),
        "timer" => board::timer(),
        "processors" => processors::all(tables),
        "cpu-hotplug" => processors::come_and_go(info.number("events"), info.number("refusals")),
        "reset" => acpi::reset(),
        "panic-device" => board::panic_device(),
        "triple-fault" => board::triple_fault(),
        "blk" => blk::read_write_flush(),
        "blk-interrupts" => blk::interrupts(),
        "blk-reset" => blk::device_reset(),
        "blk-reboot" => blk::reboot(|| {}),
        "blk-reboot-later" => blk::reboot(wait_for_input),
        "blk-storm" => storm::run(info.number("requests")),
        "memory-hotplug" => memory::run(),
        "hotplug-disks" => hotplug::disks(info.number("rounds").into()),
        "hotplug-late" => hotplug::late(),
        "net" => net::echo(),
        "vsock" => vsock::echo(),
        "blk-until-it-fails" => load::blk::until_it_fails(),
        "blk-in-steps" => load::blk::in_steps(),
        "fs-twice" => load::fs::mount_twice(),
        "load-blk" => load::blk::run(),
        "load-net" => load::net::run(),
        "load-fs" => load::fs::run(),
        "load-vsock" => load::vsock::run(),
        other => panic!("no scenario {other}"),
    }
}

/// Waits for a byte at the serial port.
fn wait_for_input() {
    while inb(0x3fd) & 1 == 0 {
        core::hint::spin_loop();
    }
}
