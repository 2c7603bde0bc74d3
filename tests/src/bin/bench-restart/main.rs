//! `bench-restart [--kills N] DEVICE...`: kills each device's backend again and again under a load
//! of the bare guest, with the real VMM, and prints a line about each device. `cargo xtask bench
//! restart` builds what this needs and runs it.

mod blk;
mod load;
mod net;
mod share;
mod vsock;

use std::env;
use std::io::{Write, stderr, stdout};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use nacre_tests::blackout::Summary;
use nacre_tests::surroundings;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Nobody is left to tell if standard error is gone.
            drop(writeln!(stderr(), "bench-restart: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Whether every device was measured and kept its promise.
fn run() -> Result<bool> {
    let mut kills = 200;
    let mut devices = Vec::new();
    let mut words = env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--kills" => kills = words.next().context("--kills without a number")?.parse()?,
            _ => devices.push(word),
        }
    }
    ensure!(kills > 0 && !devices.is_empty(), "no kills or no devices");
    writeln!(stdout(), "{}", surroundings::line()?)?;
    let mut all_well = true;
    for device in devices {
        let measured = match device.as_str() {
            "blk" => blk::measure(kills),
            "net" => net::measure(kills),
            "fs" => share::measure(kills),
            "vsock" => vsock::measure(kills),
            _ => bail!("no device {device}"),
        };
        match measured {
            Ok(summary) => {
                writeln!(stdout(), "{device} {summary}")?;
                drop(writeln!(stderr(), "  {device}: {}", summary.details()));
                all_well &= is_well(&device, &summary);
            }
            Err(error) => {
                writeln!(stdout(), "{device} not measured: {error:#}")?;
                all_well = false;
            }
        }
    }
    Ok(all_well)
}

/// A nic may lose the frames that were on their way; nothing else may happen to anything.
fn is_well(device: &str, summary: &Summary) -> bool {
    let tally = summary.tally;
    tally.repeated == 0 && tally.errors == 0 && (tally.lost == 0 || device == "net")
}
