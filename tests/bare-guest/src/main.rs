//! A guest without a kernel. The command line names the scenario; the serial port tells how it
//! went (`PASS name` or `FAIL reason`), then the machine is powered off.
#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod dma;
mod load;
mod machine;
mod pci;
mod scenarios;
mod start_info;

use start_info::StartInfo;

#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    machine::mask_pic();
    dma::start();
    machine::mask_legacy_interrupts();
    let info = StartInfo::at(start_info);
    let tables: alloc::vec::Vec<_> = acpi::tables(info.rsdp()).collect();
    let name = info.command_line().split_whitespace().next().unwrap_or("").strip_prefix("test=");
    let name = name.expect("the command line begins with test=NAME");
    say!("BEGIN {name}");
    scenarios::run(name, info, &tables);
    say!("PASS {name}");
    acpi::power_off()
}
