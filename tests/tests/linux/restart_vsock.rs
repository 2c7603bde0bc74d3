//! The way to the agent is killed again and again, while everything goes over it: no stream breaks,
//! loses a byte or repeats one.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nacre_tests::nacre::{SANDBOX_PATIENCE, User};
use nacre_tests::process::{Process, Signal, child_of};
use rustix::process::kill_process;
use serde_json::Value;

const NAME: &str = "carried";
const KILLS: usize = 6;
const EXECS: usize = 3;

/// What belongs at a position.
fn byte(at: usize) -> u8 {
    let word = (at as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word ^ word >> 29).to_le_bytes()[at % 8]
}

#[test]
fn streams_and_calls_outlive_the_process_that_carries_them() -> Result<()> {
    let user = User::new()?;
    let mut command = user.run_command(&["-i", "--name", NAME], &["cat"])?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let program = command.get_program().to_owned();
    let mut run = Process::start(program.as_ref(), &mut command)?;
    let mut input = run.child().stdin.take().context("standard input")?;
    let mut output = run.child().stdout.take().context("standard output")?;
    let supervisor = run.id();
    input.write_all(&[byte(0)])?;
    let mut first = [0];
    output.read_exact(&mut first)?;
    ensure!(first[0] == byte(0), "the first byte is {first:?}");

    let (calm, enough) = (AtomicBool::new(false), AtomicBool::new(false));
    let (sent, kills) = (AtomicUsize::new(1), AtomicUsize::new(0));
    let done = thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| -> Result<()> {
            while !enough.load(Ordering::Relaxed) {
                let at = sent.load(Ordering::Relaxed);
                let bytes: Vec<u8> = (at..at + 4099).map(byte).collect();
                input.write_all(&bytes)?;
                sent.fetch_add(bytes.len(), Ordering::Relaxed);
            }
            drop(input);
            Ok(())
        });
        let reader = scope.spawn(|| -> Result<usize> {
            let mut at = 1;
            let mut bytes = vec![0; 1 << 16];
            loop {
                let len = output.read(&mut bytes)?;
                if len == 0 {
                    return Ok(at);
                }
                let wrong = (at..at + len).zip(&bytes).position(|(at, there)| *there != byte(at));
                ensure!(wrong.is_none(), "byte {} is wrong", at + wrong.unwrap_or(0));
                at += len;
            }
        });
        let killer = scope.spawn(|| kill_until(&user, supervisor, &calm, &kills));
        let entered = enter(&user, &kills);
        calm.store(true, Ordering::Relaxed);
        killer.join().expect("no panic")?;
        let entered = entered.and_then(|()| {
            user.nacre(&["device", "restart", NAME, "vsock"])?.code(0)?;
            enter(&user, &kills)
        });
        enough.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + SANDBOX_PATIENCE;
        let is_over = || reader.is_finished() && writer.is_finished();
        while !(is_over() || entered.is_err() || Instant::now() > deadline) {
            thread::sleep(Duration::from_millis(5));
        }
        if !is_over() {
            // Nobody may wait any more for what does not come.
            run.signal(Signal::KILL)?;
        }
        let (written, read) = (writer.join(), reader.join());
        entered?;
        let read = read.expect("no panic")?;
        written.expect("no panic")?;
        let sent = sent.load(Ordering::Relaxed);
        ensure!(read == sent, "{sent} bytes were sent and {read} came back");
        Ok(())
    });
    let (status, said) = run.wait_for(SANDBOX_PATIENCE)?;
    done.with_context(|| format!("{status} after {kills:?} kills: {said}"))?;
    ensure!(status.success(), "{status}: {said}");
    Ok(())
}

/// Calls and new streams meanwhile: programs are added to the container.
fn enter(user: &User, kills: &AtomicUsize) -> Result<()> {
    let deadline = Instant::now() + SANDBOX_PATIENCE;
    let mut entered = 0;
    while entered < EXECS || kills.load(Ordering::Relaxed) < KILLS {
        ensure!(Instant::now() < deadline, "{entered} entered, {kills:?} kills");
        let word = format!("{entered}");
        let script = "cat; echo $0; exit 7";
        let mut exec = user.command(&["exec", "-i", NAME, "sh", "-c", script, &word])?;
        let answer = nacre_tests::nacre::finish(&mut exec)?.code(7)?;
        ensure!(answer.out == format!("{word}\n"), "{answer:?}");
        entered += 1;
    }
    Ok(())
}

/// Kills the process some time after it has begun to serve, and so the next one.
fn kill_until(user: &User, supervisor: u32, calm: &AtomicBool, kills: &AtomicUsize) -> Result<()> {
    while !calm.load(Ordering::Relaxed) {
        let listed = user.nacre(&["device", "list", "--json", NAME])?.code(0)?;
        let devices: Vec<Value> = serde_json::from_str(&listed.out)?;
        let serves = |device: &Value| device["id"] == "vsock" && device["state"] == "serving";
        if !devices.iter().any(serves) {
            continue;
        }
        // Not a wait for anything: the pauses differ, so that deaths fall anywhere.
        let pause = kills.load(Ordering::Relaxed) as u64 * 97 % 400;
        thread::sleep(Duration::from_millis(pause));
        if let Some(process) = child_of(supervisor, "nacre-vsock")? {
            // It may have ended in between.
            kills.fetch_add(kill_process(process, Signal::KILL).is_ok().into(), Ordering::Relaxed);
        }
    }
    Ok(())
}
