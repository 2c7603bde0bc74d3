//! `soak SECONDS SEED FIRST-ROUND`: what `cargo xtask soak` runs on the KVM host.

use std::env;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nacre_tests::soak::Soak;

fn main() -> Result<ExitCode> {
    let words: Vec<String> = env::args().skip(1).collect();
    let numbers: Vec<u64> =
        words.iter().map(|word| word.parse()).collect::<Result<_, _>>().context("numbers")?;
    let [seconds, seed, first] = numbers[..] else {
        bail!("soak SECONDS SEED FIRST-ROUND; `cargo xtask soak` runs it")
    };
    let soak = Soak::run(seed, first, Duration::from_secs(seconds))?;
    writeln!(stdout().lock(), "soak: {}", soak.summary(seed))?;
    Ok(if soak.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
