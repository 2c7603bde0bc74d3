//! vCPUs: many, and those that come and go while the guest runs.

use anyhow::{Context, Result, ensure};
use nacre_tests::control::Control;
use nacre_tests::machine::{Machine, Running};

const NAME: &str = "cpu-hotplug";

/// A machine of one vCPU that ends after so many came or went, with its control socket.
fn machine(max: u32, events: u32, refusals: u32) -> Result<(Running, Control)> {
    let (control, theirs) = Control::new()?;
    let max = max.to_string();
    let running = Machine::bare(&format!("{NAME} events={events} refusals={refusals}"))?
        .with(&["--max-cpus", &max])
        .control(theirs)
        .start()?;
    Ok((running, control))
}

fn refused(outcome: Result<()>, reason: &str) -> Result<()> {
    let error = outcome.err().with_context(|| format!("not refused: {reason}"))?;
    ensure!(error.to_string().contains(reason), "{error}");
    Ok(())
}

#[test]
fn four_processors_start() -> Result<()> {
    let machine = Machine::bare("processors")?.with(&["--cpus", "4"]);
    let ended = machine.run()?.passed("processors")?;
    ensure!(ended.value("processors")? == "4", "{ended:?}");
    Ok(())
}

#[test]
fn three_hundred_processors_start_the_last_with_an_id_beyond_eight_bits() -> Result<()> {
    let machine = Machine::bare("processors")?.with(&["--cpus", "300"]);
    let ended = machine.run()?.passed("processors")?;
    ensure!(ended.value("processors")? == "300", "{ended:?}");
    ensure!(ended.value("last")? == "299", "{ended:?}");
    Ok(())
}

#[test]
fn processors_come_start_go_and_start_again() -> Result<()> {
    // Two come, one is kept at first and goes later, both come and go once more.
    let (mut running, mut control) = machine(4, 7, 1)?;
    running.until("possible=4")?;
    for (cpus, reason) in [(0, "not between 1 and 4"), (5, "not between 1 and 4")] {
        refused(control.set_cpus(cpus), reason)?;
    }
    control.set_cpus(3)?;
    running.until("came=1")?;
    running.until("came=2")?;
    let status = control.status()?;
    ensure!((status.cpus, status.max_cpus) == (3, 4), "{status:?}");

    control.set_cpus(2)?;
    let reason = control.cpus_declined()?;
    ensure!(reason.contains("keeps vCPU 2: status 0x82"), "{reason}");
    ensure!(control.status()?.cpus == 3);
    control.set_cpus(1)?;
    control.cpus_become(1)?;
    ensure!(control.status()?.cpus == 1);

    control.set_cpus(4)?;
    for index in 1..4 {
        running.until(&format!("came={index}"))?;
    }
    let ended = running.wait()?.passed(NAME)?;
    let complaints = ended.said.lines().filter(|line| line.contains("vCPU hotplug")).count();
    ensure!((2..20).contains(&complaints), "not at a limited rate: {ended:#?}");
    Ok(())
}

#[test]
fn two_hundred_and_ninety_nine_processors_come_and_go() -> Result<()> {
    let (mut running, mut control) = machine(300, 2 * 299, 0)?;
    running.until("possible=300")?;
    control.set_cpus(300)?;
    running.until("came=299")?;
    ensure!(control.status()?.cpus == 300);
    control.set_cpus(1)?;
    control.cpus_become(1)?;
    running.wait()?.passed(NAME)?;
    Ok(())
}

#[test]
fn a_guest_that_does_not_listen_keeps_what_it_has_and_is_told_again() -> Result<()> {
    let (mut control, theirs) = Control::new()?;
    let spin = Machine::bare("spin")?.with(&["--cpus", "2", "--max-cpus", "3"]).control(theirs);
    let mut running = spin.start()?;
    running.until("BEGIN")?;
    control.set_cpus(1)?;
    ensure!(control.status()?.cpus == 2);
    refused(control.set_cpus(2), "has not yet given up 1 vCPUs")?;
    control.set_cpus(1)?;
    running.process().terminate()?;
    running.wait()?;
    Ok(())
}

#[test]
fn a_machine_without_room_for_more_keeps_what_it_has() -> Result<()> {
    let (mut control, theirs) = Control::new()?;
    let mut running = Machine::bare("spin")?.with(&["--cpus", "2"]).control(theirs).start()?;
    running.until("BEGIN")?;
    refused(control.set_cpus(1), "keeps them")?;
    refused(control.set_cpus(3), "not between 1 and 2")?;
    running.process().terminate()?;
    running.wait()?;
    Ok(())
}
