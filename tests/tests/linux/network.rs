//! A sandbox's way out: address translation, and the host's switch that forwards packets.

use std::fs;
use std::process::Command;
use std::thread;

use anyhow::{Result, ensure};
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Attached, User, finish};
use nacre_tests::packet;
use nacre_tests::process::Signal;

/// A network namespace that is this thread's way out, with no way back to a sandbox's addresses.
struct Outside;

impl Outside {
    fn new() -> Result<Self> {
        packet::own_namespace()?;
        let outside = Self;
        for line in [
            "netns add nacre-outside",
            "link set lo up",
            "link add uplink type veth peer name out netns nacre-outside",
            "addr add 192.0.2.1/24 dev uplink",
            "link set uplink up",
            "route add default via 192.0.2.2",
            "-n nacre-outside addr add 192.0.2.2/24 dev out",
            "-n nacre-outside link set out up",
        ] {
            let status = Command::new("ip").args(line.split(' ')).status()?;
            ensure!(status.success(), "ip {line}");
        }
        Ok(outside)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // The pair of interfaces goes with the namespace.
        drop(Command::new("ip").args(["netns", "delete", "nacre-outside"]).status());
    }
}

/// Whether the way out is open, as the kernel tells this thread.
fn forwards() -> Result<bool> {
    // The kernel shows each thread the switches of its own namespace.
    Ok(fs::read_to_string("/proc/sys/net/ipv4/conf/uplink/forwarding")?.trim() != "0")
}

fn ping_through_nat() -> Result<()> {
    let _outside = Outside::new()?;
    let answer = User::new()?.run(&["--net"], &["ping", "-c", "2", "-W", "20", "192.0.2.2"])?;
    let answer = answer.code(0)?;
    ensure!(answer.out.contains("2 packets received"), "{answer:?}");
    Ok(())
}

#[test]
fn a_guest_reaches_beyond_its_host_by_nat() -> Result<()> {
    // The sandbox's processes are born into the namespace of the thread that starts them.
    thread::spawn(ping_through_nat).join().expect("the test does not panic")
}

/// How many sandboxes come and go at once, and how often.
const AT_ONCE: usize = 3;
const ROUNDS: usize = 2;

/// Sandboxes that get a network and fail right after, side by side.
fn come_and_go(user: &User) -> Result<()> {
    let start = || -> Result<Command> {
        let mut command = user.run_command(&["--net"], &["true"])?;
        command.env("NACRE_FAIL_AT", "network");
        Ok(command)
    };
    for _round in 0..ROUNDS {
        let commands: Vec<Command> = (0..AT_ONCE).map(|_| start()).collect::<Result<_>>()?;
        thread::scope(|scope| -> Result<()> {
            // Threads of this one's namespace.
            let running: Vec<_> = commands
                .into_iter()
                .map(|mut command| scope.spawn(move || finish(&mut command)))
                .collect();
            for running in running {
                let answer = running.join().expect("a run does not panic")?;
                answer.code(125)?.tells("step `network` fails")?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn switch_through_storms() -> Result<()> {
    let _outside = Outside::new()?;
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    ensure!(!forwards()?, "a new interface forwards");
    come_and_go(&user)?;
    ensure!(!forwards()?, "left on");
    let mut command = user.run_command(&["--net", "-i"], &["sh", "-c", "echo up; cat"])?;
    let mut run = Attached::start(command.stdin(std::process::Stdio::piped()))?;
    run.until("up")?;
    ensure!(forwards()?, "not on");
    come_and_go(&user)?;
    ensure!(forwards()?, "taken from a sandbox that runs");
    run.process().signal(Signal::TERM)?;
    drop(run.process().child().stdin.take());
    run.wait()?;
    ensure!(!forwards()?, "left on by the last");
    before.and_nothing_more(user.state())
}

#[test]
fn sandboxes_that_come_and_go_at_once_leave_forwarding_to_those_that_need_it() -> Result<()> {
    thread::spawn(switch_through_storms).join().expect("the test does not panic")
}
