//! The nic: numbered frames that come back through a tap in a network namespace of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use nacre_tests::blackout::Summary;
use nacre_tests::packet::{self, PacketSocket};
use nacre_tests::supervised::Supervised;

use crate::load::Load;

const TAP: &str = "bench0";
const MAC: &str = "02:00:00:00:00:07";
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const HEADER_BYTES: usize = 14;
/// How long the echo waits for a frame before it looks whether it is wanted any more.
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(crate) fn measure(kills: usize) -> Result<Summary> {
    // A thread has a network namespace of its own; its children are born into it.
    let measured = thread::spawn(move || measure_here(kills));
    measured.join().map_err(|_panic| anyhow!("the measuring thread panicked"))?
}

fn measure_here(kills: usize) -> Result<Summary> {
    packet::own_namespace()?;
    let tap = packet::tap(TAP)?;
    let echo = PacketSocket::on(TAP)?;
    let mut device = Supervised::new("nacre-net", &["--mac", MAC])?.with("--tap-fd", tap);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let echoing = scope.spawn(|| send_back(&echo, &over));
        let measured = load(&mut device, kills);
        over.store(true, Ordering::Relaxed);
        let echoed = echoing.join().map_err(|_panic| anyhow!("the echo panicked"))?;
        measured.and_then(|summary| echoed.map(|()| summary))
    })
}

fn load(device: &mut Supervised, kills: usize) -> Result<Summary> {
    let mut load = Load::start("net", device)?;
    let mut summary = load.kill(device, kills)?;
    load.end()?;
    summary.tally = load.last_report()?.tally;
    Ok(summary)
}

/// Sends the guest's frames back to it, as they are but for the addresses.
fn send_back(socket: &PacketSocket, over: &AtomicBool) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        let Ok(mut frame) = socket.receive(LOOK_EVERY) else { continue };
        if frame.len() < HEADER_BYTES || frame[6..12] != GUEST_MAC {
            continue;
        }
        let (to, from) = frame[..12].split_at_mut(6);
        to.swap_with_slice(from);
        socket.send(&frame)?;
    }
    Ok(())
}
