//! The configuration of the whole sandbox, in the agent's own namespaces.

use std::fs;

use nacre_proto::agent::{ConfigureSandboxRequest, Interface, Neighbor, Route, Storage};
use ttrpc::Code;

use crate::agent::{Agent, context, with_agent};

async fn configure(agent: &Agent, request: &ConfigureSandboxRequest) -> Result<(), Code> {
    match agent.client.configure_sandbox(context(), request).await {
        Ok(_) => Ok(()),
        Err(ttrpc::Error::RpcStatus(status)) => {
            println!("{}", status.message());
            Err(status.code())
        }
        Err(other) => panic!("{other}"),
    }
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

fn interface(mac: &str, name: &str, addresses: &[&str]) -> Interface {
    Interface {
        mac: mac.to_owned(),
        name: name.to_owned(),
        mtu: 1400,
        addresses: strings(addresses),
        ..Interface::new()
    }
}

fn route(destination: &str, gateway: &str) -> Route {
    Route {
        destination: destination.to_owned(),
        gateway: gateway.to_owned(),
        interface: "eth0".to_owned(),
        ..Route::new()
    }
}

fn neighbor(address: &str, mac: &str) -> Neighbor {
    Neighbor {
        address: address.to_owned(),
        mac: mac.to_owned(),
        interface: "eth0".to_owned(),
        ..Neighbor::new()
    }
}

fn storage(driver: &str, source: &str, mount_point: &str, options: &[&str]) -> Storage {
    Storage {
        driver: driver.to_owned(),
        source: source.to_owned(),
        mount_point: mount_point.to_owned(),
        options: strings(options),
        ..Storage::new()
    }
}

#[test]
fn interfaces_and_routes_are_as_asked_for() {
    with_agent(|agent| async move {
        // Under each other's names, which must not get in the way.
        let pair = "ip link add lan address 02:00:00:00:00:02 \
                    type veth peer name eth0 address 02:00:00:00:00:03";
        agent.inside(&["sh", "-c", pair]);
        let request = ConfigureSandboxRequest {
            interfaces: vec![
                interface("02:00:00:00:00:02", "eth0", &["10.1.0.2/24", "fd00::2/64"]),
                interface("02:00:00:00:00:03", "lan", &[]),
            ],
            routes: vec![
                route("", "10.1.0.1"),
                route("192.168.7.0/24", ""),
                route("fd01::/64", "fd00::1"),
            ],
            neighbors: vec![
                neighbor("10.1.0.9", "02:00:00:00:00:09"),
                neighbor("fd00::9", "02:00:00:00:00:0a"),
            ],
            sysctls: [("net.ipv4.ip_forward", "1"), ("net/ipv4/conf/eth0/arp_ignore", "2")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            ..ConfigureSandboxRequest::new()
        };
        configure(&agent, &request).await.unwrap();
        let links = agent.inside(&["ip", "-o", "link"]);
        assert!(links.contains("lo: <LOOPBACK,UP"), "{links}");
        let eth0 = links.lines().find(|line| line.contains(" eth0@")).unwrap();
        assert!(eth0.contains("02:00:00:00:00:02") && eth0.contains("mtu 1400"), "{links}");
        let addresses = agent.inside(&["ip", "-o", "addr", "show", "eth0"]);
        assert!(addresses.contains("10.1.0.2/24") && addresses.contains("fd00::2/64"));
        let neighbors = agent.inside(&["ip", "neigh"]);
        for (address, mac) in [("10.1.0.9", "02:00:00:00:00:09"), ("fd00::9", "02:00:00:00:00:0a")]
        {
            let entry = format!("{address} dev eth0 lladdr {mac} PERMANENT");
            assert!(neighbors.contains(&entry), "{neighbors}");
        }
        for (setting, value) in [("ip_forward", "1\n"), ("conf/eth0/arp_ignore", "2\n")] {
            let file = format!("/proc/sys/net/ipv4/{setting}");
            assert_eq!(agent.inside(&["cat", &file]), value, "{setting}");
        }
        let routes = agent.inside(&["ip", "route"]);
        assert!(routes.contains("default via 10.1.0.1 dev eth0"), "{routes}");
        assert!(routes.contains("192.168.7.0/24 dev eth0"), "{routes}");
        let routes = agent.inside(&["ip", "-6", "route"]);
        assert!(routes.contains("fd01::/64 via fd00::1"), "{routes}");
    });
}

#[test]
fn name_name_servers_seed_and_storages_are_as_asked_for_once() {
    with_agent(|agent| async move {
        let request = ConfigureSandboxRequest {
            hostname: "pod".to_owned(),
            random_seed: vec![7; 32],
            nameservers: strings(&["10.1.0.1"]),
            storages: vec![
                storage("tmpfs", "", "/run/nacre/lower", &["size=1m", "nosuid"]),
                storage("overlay", "/run/nacre/lower", "/run/nacre/top", &["size=2m"]),
            ],
            ..ConfigureSandboxRequest::new()
        };
        configure(&agent, &request).await.unwrap();
        assert_eq!(agent.inside(&["hostname"]), "pod\n");
        assert_eq!(agent.inside(&["cat", "/run/nacre/resolv.conf"]), "nameserver 10.1.0.1\n");
        agent.inside(&["sh", "-c", "echo x > /run/nacre/top/a"]);
        assert_eq!(agent.inside(&["ls", "/run/nacre/lower"]), "");
        let mounts = agent.inside(&["cat", "/proc/mounts"]);
        assert!(mounts.contains("tmpfs /run/nacre/lower tmpfs rw,nosuid"), "{mounts}");
        assert!(mounts.contains("overlay /run/nacre/top overlay"), "{mounts}");
        assert_eq!(configure(&agent, &request).await, Err(Code::FAILED_PRECONDITION));
        agent.shutdown().await.unwrap();
        let log = agent.log();
        assert!(!log.contains("can't unmount"), "{log}");
    });
}

#[test]
fn a_device_that_does_not_appear_is_not_found() {
    with_agent(|agent| async move {
        let request = ConfigureSandboxRequest {
            interfaces: vec![interface("02:00:00:00:00:09", "eth0", &[])],
            ..ConfigureSandboxRequest::new()
        };
        assert_eq!(configure(&agent, &request).await, Err(Code::NOT_FOUND));
    });
}

#[test]
fn a_configuration_that_makes_no_sense_changes_nothing() {
    with_agent(|agent| async move {
        let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let outside = Storage {
            driver: "tmpfs".to_owned(),
            mount_point: "/etc".to_owned(),
            ..Storage::new()
        };
        let request = ConfigureSandboxRequest {
            hostname: "changed".to_owned(),
            storages: vec![outside],
            ..ConfigureSandboxRequest::new()
        };
        assert_eq!(configure(&agent, &request).await, Err(Code::INVALID_ARGUMENT));
        assert_eq!(agent.inside(&["hostname"]), name);
        // It may be tried again, since nothing was done.
        configure(&agent, &ConfigureSandboxRequest::new()).await.unwrap();
    });
}
