//! Input, output, signals and the exit code.

use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nacre_tests::nacre::{Attached, SANDBOX_PATIENCE};
use nacre_tests::process::{Process, Signal};
use nacre_tests::xtask::{host_up, xtask};

/// How long a command may go on after it has nothing more to do: what a busy container is given
/// after its reader went away, and twice as much again.
const PROMPTLY: Duration = Duration::from_secs(30);

/// Bytes of every value in no order, always the same ones.
fn noise(len_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..len_bytes / 4).flat_map(|_| next()).collect();
    bytes.truncate(len_bytes);
    bytes
}

#[test]
fn a_mebibyte_of_noise_passes_both_ways_and_nothing_is_added_to_it() -> Result<()> {
    host_up()?;
    let script = "cat; echo at the end >&2; exit 3";
    let mut command = xtask(&["run", "-i", "--", "sh", "-c", script])?;
    let program = command.get_program().to_owned();
    let mut run =
        Process::start(program.as_ref(), command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    let input = noise(1 << 20);
    let mut to = run.child().stdin.take().context("standard input")?;
    let mut from = run.child().stdout.take().context("standard output")?;
    let sent = input.clone();
    let writer = thread::spawn(move || to.write_all(&sent));
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).map(|_| bytes)
    });
    let (status, said) = run.wait_for(SANDBOX_PATIENCE)?;
    ensure!(status.code() == Some(3), "{status}: {said}");
    writer.join().ok().context("the writer")??;
    let output = reader.join().ok().context("the reader")??;
    ensure!(output == input, "{} bytes came back otherwise: {said}", output.len());
    // The host's line, the container's, and no word of anything being set up.
    let lines: Vec<_> = said.lines().collect();
    ensure!(
        lines.len() == 2 && lines[0].starts_with("xtask: host: ") && lines[1] == "at the end",
        "{lines:#?}"
    );
    Ok(())
}

#[test]
fn a_reader_that_leaves_ends_an_endless_output() -> Result<()> {
    host_up()?;
    let run = Attached::start(&mut xtask(&["run", "--", "yes"])?)?;
    run.until("y")?;
    let left = Instant::now();
    // Its pipe is broken; it is safe from the signal, as the first process of its namespace.
    run.leave()?.code(1)?.tells("Broken pipe")?;
    ensure!(left.elapsed() < PROMPTLY, "only after {:?}", left.elapsed());
    Ok(())
}

#[test]
fn signals_reach_the_container_and_a_second_one_ends_it_by_force() -> Result<()> {
    host_up()?;
    let script = "trap 'echo int' INT; trap 'echo term' TERM; echo up; while :; do sleep 0.1; done";
    let mut run = Attached::start(&mut xtask(&["run", "--", "sh", "-c", script])?)?;
    run.until("up")?;
    run.process().signal(Signal::INT)?;
    run.until("int")?;
    run.process().signal(Signal::TERM)?;
    let left = Instant::now();
    run.wait()?.code(128 + 9)?;
    ensure!(left.elapsed() < PROMPTLY, "only after {:?}", left.elapsed());
    Ok(())
}
