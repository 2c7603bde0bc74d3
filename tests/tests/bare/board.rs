//! The machine itself.

use anyhow::{Result, ensure};
use nacre_proto::exit::VmmExit;
use nacre_tests::machine::Machine;

fn passes(name: &str) -> Result<()> {
    Machine::bare(name)?.run()?.passed(name)?;
    Ok(())
}

#[test]
fn a_guest_boots_by_pvh_and_powers_off() -> Result<()> {
    passes("hello")
}

#[test]
fn the_memory_map_holds_what_was_asked_for() -> Result<()> {
    for (size, least) in [("64M", 63 << 20), ("5G", (5_u64 << 30) - (2 << 20))] {
        let ended = Machine::bare("memory")?.with(&["--memory", size]).run()?.passed("memory")?;
        let total: u64 = ended.value("total")?.parse()?;
        let asked = (least + (2 << 20)) & !((1 << 20) - 1);
        ensure!(least <= total && total <= asked, "{total} of {size}");
    }
    Ok(())
}

#[test]
fn the_acpi_tables_are_those_of_a_hardware_reduced_machine() -> Result<()> {
    passes("acpi")
}

#[test]
fn ports_and_ecam_show_the_same_pci_bus() -> Result<()> {
    passes("pci")
}

#[test]
fn cpuid_tells_of_the_hypervisor_in_ring_0() -> Result<()> {
    passes("cpuid")
}

#[test]
fn the_clock_answers() -> Result<()> {
    passes("clock")
}

#[test]
fn the_apic_timer_wakes_a_halted_processor() -> Result<()> {
    passes("timer")
}

#[test]
fn a_reset_ends_the_vmm_with_its_own_code_when_asked() -> Result<()> {
    let ended = Machine::bare("reset")?.with(&["--on-reset", "exit"]).run()?;
    ensure!(ended.ended(VmmExit::Reset), "{ended:#?}");
    Ok(())
}

#[test]
fn a_panic_reported_by_the_guest_has_its_own_code() -> Result<()> {
    let ended = Machine::bare("panic-device")?.run()?;
    ensure!(ended.ended(VmmExit::GuestPanic), "{ended:#?}");
    Ok(())
}

#[test]
fn a_triple_fault_has_its_own_code() -> Result<()> {
    let ended = Machine::bare("triple-fault")?.run()?;
    ensure!(ended.ended(VmmExit::GuestCrash), "{ended:#?}");
    ensure!(ended.guest.iter().any(|line| line.starts_with("EXCEPTION")), "{ended:#?}");
    Ok(())
}

#[test]
fn sigterm_stops_a_running_machine() -> Result<()> {
    let mut running = Machine::bare("spin")?.start()?;
    running.until("BEGIN")?;
    running.process().terminate()?;
    let ended = running.wait()?;
    ensure!(ended.ended(VmmExit::Stopped) || ended.ended(VmmExit::PowerOff), "{ended:#?}");
    Ok(())
}
