//! Plans: what is asked for against what comes out.

use std::net::Ipv4Addr;

use super::*;

pub(crate) fn config() -> SandboxConfig {
    SandboxConfig {
        name: "web".parse().unwrap(),
        kernel: "/kernel".into(),
        initramfs: "/initramfs".into(),
        kernel_arguments: vec!["loglevel=7".to_owned()],
        verbose_kernel: false,
        cpus: 1,
        max_cpus: None,
        memory: ByteSize(512 << 20),
        max_memory: None,
        passthrough: Vec::new(),
        network: NetworkConfig::Own,
        hostname: None,
        sysctls: BTreeMap::new(),
        contents: Contents::Container(Box::new(container())),
        host_limits: HostLimits::default(),
    }
}

fn container() -> ContainerConfig {
    ContainerConfig {
        rootfs: "/rootfs".into(),
        writable_rootfs: false,
        volumes: vec![Volume { host: "/data".into(), guest: "/mnt/data".into(), read_only: true }],
        disks: vec![Disk { path: "/disk.img".into(), read_only: false }],
        process: ProcessConfig { arguments: vec!["true".to_owned()], ..ProcessConfig::default() },
        limits: ContainerLimits { memory: Some(ByteSize(64 << 20)), pids: Some(10) },
    }
}

pub(crate) fn facts() -> HostFacts {
    HostFacts {
        cpus: 2,
        memory: ByteSize(1 << 30),
        memory_and_swap: ByteSize(1 << 30),
        address_bits: Some(40),
        nameservers: vec![Ipv4Addr::new(10, 0, 0, 2)],
        passwd: String::new(),
        group: String::new(),
    }
}

fn of(config: &mut SandboxConfig) -> &mut ContainerConfig {
    let Contents::Container(container) = &mut config.contents else { panic!("a pod") };
    container
}

fn plan(change: impl FnOnce(&mut SandboxConfig)) -> Result<SandboxPlan, PlanError> {
    let mut config = config();
    change(&mut config);
    SandboxPlan::new(config, &facts())
}

#[test]
fn each_device_has_a_backend_of_its_own() {
    let plan = plan(|_| ()).unwrap();
    let ids: Vec<&str> = plan.devices.iter().map(DevicePlan::id).collect();
    assert_eq!(ids, ["vsock", "rootfs", "volume-0", "disk-0", "net"]);
}

#[test]
fn the_root_file_system_is_below_an_overlay_unless_it_is_to_be_written() {
    let mounts = |plan: &SandboxPlan| -> Vec<(String, String)> {
        let mounts = plan.storages.iter();
        mounts.map(|s| (s.driver.clone(), s.mount_point.clone())).take(2).collect()
    };
    let entry = |driver: &str, path: &str| (driver.to_owned(), path.to_owned());
    assert_eq!(
        mounts(&plan(|_| ()).unwrap()),
        [entry("virtiofs", "/run/nacre/lower"), entry("overlay", "/run/nacre/rootfs")]
    );
    assert_eq!(
        mounts(&plan(|config| of(config).writable_rootfs = true).unwrap()),
        [entry("virtiofs", "/run/nacre/rootfs"), entry("virtiofs", "/run/nacre/volumes/0")]
    );
}

#[test]
fn the_specification_carries_what_was_asked_for() {
    let spec = serde_json::to_value(plan(|_| ()).unwrap().container.unwrap().spec).unwrap();
    assert_eq!(spec["hostname"], "web");
    assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 64 << 20);
    assert_eq!(spec["linux"]["resources"]["pids"]["limit"], 10);
    let mounts = spec["mounts"].as_array().unwrap();
    let at = |path: &str| mounts.iter().find(|mount| mount["destination"] == path);
    assert_eq!(at("/mnt/data").unwrap()["source"], "/run/nacre/volumes/0");
    assert!(at("/mnt/data").unwrap()["options"].as_array().unwrap().iter().any(|o| o == "ro"));
    assert!(at("/etc/resolv.conf").is_some());
    let capabilities = spec["process"]["capabilities"]["bounding"].as_array().unwrap();
    assert!(!capabilities.iter().any(|capability| capability == "CAP_SYS_ADMIN"));
    let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
    assert!(!namespaces.iter().any(|namespace| namespace["type"] == "network"));
}

#[test]
fn the_kernel_is_quiet_unless_told_otherwise() {
    let line = plan(|_| ()).unwrap().command_line;
    assert!(line.starts_with("console=ttyS0 panic=-1 ") && line.ends_with(" quiet loglevel=7"));
    assert!(!line.contains("mitigations"));
    let line = plan(|config| config.verbose_kernel = true).unwrap().command_line;
    assert!(!line.contains("quiet"));
}

#[test]
fn what_makes_no_sense_is_refused() {
    assert_eq!(plan(|config| config.cpus = 0).unwrap_err(), PlanError::NoCpus);
    assert_eq!(plan(|config| config.memory = ByteSize(0)).unwrap_err(), PlanError::NoMemory);
    let error = plan(|config| config.memory = ByteSize(2 << 30)).unwrap_err();
    assert_eq!(error.to_string(), "memory of 2G is more than the host's memory and swap, 1G");
    let error = plan(|config| of(config).volumes[0].guest = "/".into()).unwrap_err();
    assert_eq!(error, PlanError::VolumeOnRoot);
    let error = plan(|config| of(config).volumes[0].guest = "data".into()).unwrap_err();
    assert!(matches!(error, PlanError::NotAbsolute { .. }));
    let error = plan(|config| config.hostname = Some("a b".to_owned())).unwrap_err();
    assert!(matches!(error, PlanError::Hostname(_)));
    let error = plan(|config| config.kernel_arguments.push("x".repeat(2048))).unwrap_err();
    assert!(matches!(error, PlanError::CommandLine(_)));
}
