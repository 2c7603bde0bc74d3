//! `nacre-net` on a tap in a network namespace of its own, and the driver of `virtio-drivers`.

use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nacre_tests::backend::Backend;
use nacre_tests::machine::Machine;
use nacre_tests::packet::{self, PacketSocket};
use nacre_tests::process::PATIENCE;

pub(crate) const GUEST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 7];
pub(crate) const HOST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

fn frame(payload: &[u8]) -> Vec<u8> {
    [&GUEST_MAC[..], &HOST_MAC, &[0x88, 0xb5], payload].concat()
}

#[test]
fn frames_come_back_through_the_tap() -> Result<()> {
    // A thread has a network namespace of its own; its children are born into it.
    thread::spawn(echo_in_own_namespace).join().expect("the test does not panic")
}

fn echo_in_own_namespace() -> Result<()> {
    packet::own_namespace()?;
    let made = Command::new("ip").args(["tuntap", "add", "t0", "mode", "tap", "vnet_hdr"]).status();
    ensure!(made.context("the ip command")?.success(), "cannot make a tap");
    ensure!(Command::new("ip").args(["link", "set", "t0", "up"]).status()?.success());
    let dir = tempfile::tempdir()?;
    let args = ["--tap", "t0", "--mac", "02:00:00:00:00:07"];
    let backend = Backend::start("nacre-net", dir.path(), &args)?;
    let mut running = Machine::bare("net")?.device("net0", "net", backend.socket()).start()?;
    ensure!(running.until("mac=")? == "02:00:00:00:00:07");
    running.until("READY")?;

    let socket = PacketSocket::on("t0")?;
    for round in 0..100_u32 {
        let mut payload = vec![0; 46 + (round as usize * 13) % 1400];
        payload[..4].copy_from_slice(&round.to_le_bytes());
        socket.send(&frame(&payload))?;
        let answer = receive_echo(&socket)?;
        ensure!(answer[..6] == HOST_MAC && answer[6..12] == GUEST_MAC, "addresses {answer:?}");
        ensure!(answer[14..] == payload, "frame {round} came back changed");
    }
    socket.send(&frame(b"stop, padded to the length that a frame needs to have......"))?;
    let ended = running.wait()?.passed("net")?;
    ensure!(ended.value("echoed")? == "100", "{ended:?}");
    Ok(())
}

/// The next frame of this test's kind that the guest sent.
fn receive_echo(socket: &PacketSocket) -> Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        ensure!(Instant::now() < deadline, "no echo within {PATIENCE:?}");
        let frame = socket.receive(PATIENCE)?;
        if frame.len() >= 14 && frame[12..14] == [0x88, 0xb5] && frame[6..12] == GUEST_MAC {
            return Ok(frame);
        }
    }
}
