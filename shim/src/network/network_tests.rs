//! Name servers, and the switch that sandboxes share.

use std::{env, process::Command, thread, time::Duration};

use super::*;
use crate::{record::tests::record, registry::Registry};

#[test]
fn name_servers_on_the_hosts_loopback_are_of_no_use_to_a_guest() {
    let text = "# x\nnameserver 127.0.0.53\nnameserver 10.0.0.2\nnameserver ::1\nsearch a\n";
    assert_eq!(parse_nameservers(text), [Ipv4Addr::new(10, 0, 0, 2)]);
}

/// Sandboxes that come and go at once, and how often each.
const THREADS: usize = 4;
const ROUNDS: usize = 5;
/// An interface that every network namespace has.
const UPLINK: &str = "lo";
const INSIDE: &str = "NACRE_TEST_IN_NAMESPACE";

fn is_on() -> bool {
    fs::read_to_string(forwarding_switch(UPLINK)).unwrap().trim() != "0"
}

fn come_and_go(registry: &Registry, thread: usize) {
    for round in 0..ROUNDS {
        let mut sandbox = registry.claim(record(&format!("s{thread}-{round}"))).unwrap();
        let tap = sandbox.reserve_network(None).unwrap().tap();
        open_way(&mut sandbox, &tap, UPLINK, Firewall::Nft).unwrap();
        assert!(is_on(), "never on, or taken away by another's end");
        thread::yield_now();
        assert!(is_on(), "taken away by another's end");
        sandbox.release_networks();
    }
}

/// Runs the test called `name` again, in a network namespace of its own, unless it is there.
fn is_inside(name: &str) -> bool {
    if env::var_os(INSIDE).is_some() {
        fs::write(forwarding_switch(UPLINK), "0").unwrap();
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root makes network namespaces");
        return false;
    }
    let mut again = Command::new("unshare");
    again.arg("--net").arg(env::current_exe().unwrap());
    again.args(["--exact", &format!("network::tests::{name}")]).env(INSIDE, "");
    let output = again.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    false
}

#[test]
fn sandboxes_that_come_and_go_at_once_share_the_switch() {
    if !is_inside("sandboxes_that_come_and_go_at_once_share_the_switch") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::open(folder.path().join("state")).unwrap();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let registry = &registry;
            scope.spawn(move || come_and_go(registry, thread));
        }
    });
    assert!(!is_on(), "left on");
}

#[test]
fn nobody_decides_on_the_switch_while_another_does() {
    if !is_inside("nobody_decides_on_the_switch_while_another_does") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::open(folder.path().join("state")).unwrap();
    let mut first = registry.claim(record("first")).unwrap();
    let tap = first.reserve_network(None).unwrap().tap();
    open_way(&mut first, &tap, UPLINK, Firewall::Nft).unwrap();
    let mut second = registry.claim(record("second")).unwrap();
    let tap = second.reserve_network(None).unwrap().tap();
    thread::scope(|scope| {
        // As the first is when it ends: it has looked who needs the switch, and nobody does.
        let deciding = first.lock().unwrap();
        let opening = scope.spawn(|| open_way(&mut second, &tap, UPLINK, Firewall::Nft));
        thread::sleep(Duration::from_millis(100));
        assert!(!opening.is_finished(), "decided on a switch that is about to be off");
        fs::write(forwarding_switch(UPLINK), "0").unwrap();
        drop(deciding);
        opening.join().unwrap().unwrap();
    });
    assert!(is_on(), "the second needs it");
    first.release_networks();
    assert!(is_on(), "taken from the second");
    second.release_networks();
    assert!(!is_on(), "left on");
}

#[test]
fn a_sandbox_s_networks_come_and_go_one_by_one() {
    if !is_inside("a_sandbox_s_networks_come_and_go_one_by_one") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::open(folder.path().join("state")).unwrap();
    let mut sandbox = registry.claim(record("one")).unwrap();
    let mut taps = Vec::new();
    for device in [None, Some("net-1"), Some("net-2")] {
        let tap = sandbox.reserve_network(device).unwrap().tap();
        open_way(&mut sandbox, &tap, UPLINK, Firewall::Nft).unwrap();
        assert!(!taps.contains(&tap));
        taps.push(tap);
    }
    sandbox.release_first_network();
    sandbox.release_network("net-1");
    sandbox.release_network("net-7");
    assert!(is_on(), "the last network needs it");
    let left: Vec<String> =
        sandbox.record().networks().map(|network| network.tap.clone()).collect();
    assert_eq!(left, taps[2..]);
    sandbox.release_networks();
    assert!(!is_on(), "left on");
    assert_eq!(sandbox.record().networks().count(), 0);
}
