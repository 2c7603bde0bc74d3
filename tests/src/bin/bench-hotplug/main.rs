//! `bench-hotplug [--rounds N]`: what comes to a running guest and goes again, from the call to what
//! the guest sees of it, with our VMM and with QEMU in turns. `cargo xtask bench hotplug` builds what
//! this needs and runs it.

mod guest;
mod ours;
mod qemu;
mod qmp;

use std::env;
use std::io::{Write, stderr, stdout};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nacre_tests::versus::Versus;
use nacre_tests::{packet, surroundings};

use crate::guest::{Console, Thing};
use crate::ours::Ours;
use crate::qemu::Qemu;

/// A VMM with a guest that runs.
pub(crate) trait Vmm {
    /// The guest's serial port.
    fn console(&mut self) -> &mut Console;
    /// Brings a thing; gives the moment in which all was ready that it needs of the host, and only the
    /// guest had to be given it.
    fn add(&mut self, thing: Thing) -> Result<Instant>;
    /// Has the guest give it up.
    fn remove(&mut self, thing: Thing) -> Result<()>;
    /// Waits until the VMM says that it is gone, and clears away what was made for it.
    fn clear(&mut self, thing: Thing) -> Result<()>;
}

/// How long things took.
struct Times {
    /// From the call until the guest's kernel has it.
    seen: Duration,
    /// The same, without what was made ready on the host first.
    given: Duration,
    /// From the call until it can be used.
    used: Duration,
    /// From the other call until the guest's kernel has it no more.
    gone: Duration,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if standard error is gone.
            drop(writeln!(stderr(), "bench-hotplug: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut rounds = 10_usize;
    let mut words = env::args().skip(1);
    while let Some(word) = words.next() {
        ensure!(word == "--rounds", "{word} is not known");
        rounds = words.next().context("--rounds without a number")?.parse()?;
    }
    ensure!(rounds > 0, "no rounds");
    // Of the main thread, which has no children yet: both VMMs' taps are in it.
    packet::own_namespace()?;
    for tap in [ours::TAP, qemu::TAP] {
        tap_is_made(tap)?;
    }
    writeln!(stdout(), "{}", surroundings::line()?)?;
    let (mut ours, mut qemu) = (Ours::boot()?, Qemu::boot()?);
    writeln!(stdout(), "{}", qemu.version()?)?;
    // The first of each kind has more to do in the guest, and in the host: programs are read in.
    for thing in Thing::ALL {
        measure(&mut ours, thing)?;
        measure(&mut qemu, thing)?;
    }
    for thing in Thing::ALL {
        let mut taken = Vec::new();
        for round in 0..rounds {
            // Whoever is the second finds the host's caches as the first one left them.
            taken.push(if round % 2 == 0 {
                let ours = measure(&mut ours, thing)?;
                (ours, measure(&mut qemu, thing)?)
            } else {
                let theirs = measure(&mut qemu, thing)?;
                (measure(&mut ours, thing)?, theirs)
            });
        }
        tell(thing, &taken)?;
    }
    Ok(())
}

/// Prints a line for each time that was taken of a thing.
fn tell(thing: Thing, taken: &[(Times, Times)]) -> Result<()> {
    let line = |what: &str, time: fn(&Times) -> Duration| -> Result<()> {
        let mut versus = Versus::default();
        taken.iter().for_each(|(ours, theirs)| versus.add(time(ours), time(theirs)));
        Ok(writeln!(stdout(), "{} {what}: {versus}", thing.name())?)
    };
    line("visible", |times| times.seen)?;
    if thing.needs_the_host() {
        line("visible, host ready", |times| times.given)?;
    }
    if let Some(what) = thing.use_of_it() {
        line(what, |times| times.used)?;
    }
    line("gone", |times| times.gone)
}

fn tap_is_made(name: &str) -> Result<()> {
    for arguments in
        [&["tuntap", "add", name, "mode", "tap", "vnet_hdr"][..], &["link", "set", name, "up"]]
    {
        let status = Command::new("ip").args(arguments).status().context("ip")?;
        ensure!(status.success(), "ip {arguments:?}: {status}");
    }
    Ok(())
}

fn measure(vmm: &mut dyn Vmm, thing: Thing) -> Result<Times> {
    let looked = vmm.console().look_for(thing)?;
    let ready = vmm.add(thing).with_context(|| format!("{} does not come", thing.name()))?;
    let (seen, used) = (vmm.console().sees(looked)?, vmm.console().uses(looked)?);
    let given = seen.saturating_sub(ready.saturating_duration_since(looked));
    let looked = vmm.console().look_away(thing)?;
    vmm.remove(thing).with_context(|| format!("{} does not go", thing.name()))?;
    let gone = vmm.console().misses(looked)?;
    vmm.clear(thing).with_context(|| format!("{} is not cleared away", thing.name()))?;
    Ok(Times { seen, given, used, gone })
}
