//! Our nic under QEMU, killed while a Linux guest sends and receives. QEMU connects anew by itself,
//! takes the link down meanwhile, and keeps nothing of what is in flight.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacre_tests::backend::Backend;
use nacre_tests::packet;
use nacre_tests::process::Signal;

use crate::guest::Guest;
use crate::ping::Pings;

/// How often the backend is killed.
const KILLS: u32 = 24;
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const HOST: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 5000);
/// The tap and its addresses, as arguments of `ip`.
const NETWORK: [&str; 4] = [
    "tuntap add t0 mode tap vnet_hdr",
    "link set t0 up",
    "addr add 192.0.2.1/24 dev t0",
    "neigh add 192.0.2.2 lladdr 02:00:00:00:00:07 dev t0",
];

/// Sends to the host, without a pause, what the host is to send back.
const SCRIPT: &str = "#!/bin/sh
mkdir -p /tmp
ip link set eth0 up
ip addr add 192.0.2.2/24 dev eth0
i=0
while [ ! -e /job/enough ]; do
    i=$((i + 1))
    dd if=/dev/urandom of=/tmp/new bs=64k count=8 2>/dev/null
    nc 192.0.2.1 5000 < /tmp/new > /tmp/old || echo \"round $i: no answer\" >> /job/errors
    cmp /tmp/new /tmp/old || echo \"round $i: differs\" >> /job/errors
    echo $i > /job/count
    mv /job/count /job/rounds
done
dmesg | grep -i 'timed out\\|hung\\|call trace\\|nobody cared' >> /job/errors
echo done > /job/result
";

#[test]
fn a_guest_of_qemu_goes_on_sending_and_receiving_through_a_nic_that_is_killed() -> Result<()> {
    // A thread has a network namespace of its own; its children are born into it.
    thread::spawn(kill_again_and_again).join().expect("the test does not panic")
}

fn kill_again_and_again() -> Result<()> {
    packet::own_namespace()?;
    for command in NETWORK {
        let status = Command::new("ip").args(command.split(' ')).status();
        ensure!(status.context("the ip command")?.success(), "ip {command}");
    }
    let listener = TcpListener::bind(HOST)?;
    thread::spawn(move || listener.incoming().for_each(|stream| drop(stream.map(send_back))));
    let dir = tempfile::tempdir()?;
    let mut nic = Backend::start("nacre-net", dir.path(), &["--tap", "t0"])?;
    let chardev = format!("socket,id=nic,path={},reconnect-ms=10", nic.socket().display());
    let netdev = "vhost-user,id=net,chardev=nic";
    let device = "virtio-net-pci,netdev=net,mac=02:00:00:00:00:07";
    let devices = ["-chardev", &chardev, "-netdev", netdev, "-device", device];
    let mut guest = Guest::start(dir.path(), SCRIPT, &devices.map(str::to_owned))?;
    guest.another_round()?;
    let pings = Pings::start(GUEST)?;
    for kill in 0..KILLS {
        pings.another().with_context(|| format!("before kill {kill}"))?;
        // Each at another moment of a round.
        thread::sleep(Duration::from_millis(u64::from(kill % 7) * 37));
        nic = nic.replace(Signal::KILL)?;
        pings.another().with_context(|| format!("after kill {kill}"))?;
        guest.another_round().with_context(|| format!("after kill {kill}"))?;
    }
    let tally = pings.finish()?;
    guest.finish()?;
    ensure!(tally.answered > KILLS as usize && tally.repeated == 0, "{tally:?}");
    Ok(())
}

/// Takes all that comes, and sends it back then.
fn send_back(mut stream: TcpStream) -> std::io::Result<()> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    stream.write_all(&all)
}
