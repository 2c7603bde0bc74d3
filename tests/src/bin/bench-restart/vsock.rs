//! The socket device: a stream of numbered words to the guest, which checks it and sends it back.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use nacre_tests::blackout::{Summary, Tally};
use nacre_tests::hybrid_vsock::connect;
use nacre_tests::supervised::Supervised;

use crate::load::Load;

/// How many words are written at a time.
const PIECE_WORDS: u64 = 64;

pub(crate) fn measure(kills: usize) -> Result<Summary> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("vsock");
    let arguments = ["--guest-cid", "42", "--uds-path", &path.display().to_string()];
    let mut device = Supervised::new("nacre-vsock", &arguments)?;
    let mut load = Load::start("vsock", &mut device)?;
    let stream = connect(&path, 5000)?;
    let over = AtomicBool::new(false);
    let (summary, back) = thread::scope(|scope| {
        let writing = scope.spawn(|| write(&stream, &over));
        let reading = scope.spawn(|| read(&stream));
        let summary = load.kill(&mut device, kills).and_then(|summary| {
            load.end()?;
            Ok(summary)
        });
        over.store(true, Ordering::Relaxed);
        if summary.is_err() {
            // Nobody may wait any more for what does not come.
            drop(stream.shutdown(Shutdown::Both));
        }
        let written = writing.join().map_err(|_panic| anyhow!("the writer panicked"))?;
        let back = reading.join().map_err(|_panic| anyhow!("the reader panicked"))?;
        let (summary, words, mut back) = (summary?, written?, back?);
        back.lost += words.saturating_sub(back.done);
        Ok::<_, anyhow::Error>((summary, back))
    })?;
    stream.shutdown(Shutdown::Both).ok();
    let there = load.last_report()?.tally;
    let tally = Tally {
        done: there.done,
        lost: there.lost + back.lost,
        repeated: there.repeated + back.repeated,
        errors: there.errors + back.errors,
    };
    Ok(Summary { tally, ..summary })
}

/// Writes words until it is enough; says how many.
fn write(mut stream: &UnixStream, over: &AtomicBool) -> Result<u64> {
    let mut next = 0;
    while !over.load(Ordering::Relaxed) {
        let piece: Vec<u8> = (next..next + PIECE_WORDS).flat_map(u64::to_le_bytes).collect();
        stream.write_all(&piece).context("cannot write to the guest")?;
        next += PIECE_WORDS;
    }
    // Said in the stream, as the reader has to know it too.
    stream.write_all(&[0xff; 8]).context("cannot write to the guest")?;
    Ok(next)
}

/// Reads words until the last one, and counts what is missing and what comes again.
fn read(mut stream: &UnixStream) -> Result<Tally> {
    let mut tally = Tally::default();
    loop {
        let mut word = [0; 8];
        stream.read_exact(&mut word).context("cannot read from the guest")?;
        match u64::from_le_bytes(word) {
            u64::MAX => return Ok(tally),
            word if word >= tally.done + (1 << 32) => bail!("the stream is out of step: {word:#x}"),
            word => {
                tally.lost += word.saturating_sub(tally.done);
                tally.repeated += tally.done.saturating_sub(word);
                tally.done = word + 1;
            }
        }
    }
}
