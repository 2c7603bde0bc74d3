//! The OCI runtime specification of a container that was not made by containerd. Pure.
//!
//! The defaults are those of the common container tools: a small set of capabilities, masked and
//! read-only paths below /proc and /sys, every namespace but the network's, which the container
//! shares with its guest.

use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use crate::{
    name::SandboxName,
    plan::{ContainerConfig, GUEST, PlanError, inputs::HostFacts, process},
};

const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The whole specification.
///
/// # Errors
///
/// Fails if the process makes no sense.
pub fn build(
    config: &ContainerConfig,
    (name, hostname): (&SandboxName, &str),
    facts: &HostFacts,
    resolver: bool,
) -> Result<Spec, PlanError> {
    let mut process = process::object(&config.process, hostname, &facts.passwd, &facts.group)?;
    process["capabilities"] = json!({
        "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
    });
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 1_048_576, "hard": 1_048_576}]);
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": format!("{GUEST}/rootfs"), "readonly": false},
        "hostname": hostname,
        "mounts": mounts(config, resolver),
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"},
            ],
            "cgroupsPath": format!("/nacre/{name}"),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "resources": resources(config),
        },
    });
    serde_json::from_value(spec).map_err(|error| PlanError::Spec(error.to_string()))
}

fn mounts(config: &ContainerConfig, resolver: bool) -> Vec<Value> {
    let mount = |kind: &str, destination: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let mut mounts = vec![
        mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "devpts",
            "/dev/pts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        mount("cgroup", "/sys/fs/cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    let bind = |source: String, destination: &str, options: &[&str]| json!({"destination": destination, "type": "bind", "source": source, "options": options});
    if resolver {
        let source = format!("{GUEST}/resolv.conf");
        mounts.push(bind(source, "/etc/resolv.conf", &["rbind", "ro", "rprivate"]));
    }
    mounts.extend(config.volumes.iter().enumerate().map(|(index, volume)| {
        let access = if volume.read_only { "ro" } else { "rw" };
        let destination = volume.guest.to_string_lossy();
        bind(format!("{GUEST}/volumes/{index}"), &destination, &["rbind", access, "rprivate"])
    }));
    mounts
}

fn resources(config: &ContainerConfig) -> Value {
    let mut resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
    if let Some(memory) = config.limits.memory {
        resources["memory"] = json!({"limit": memory.0, "swap": memory.0});
    }
    if let Some(pids) = config.limits.pids {
        resources["pids"] = json!({"limit": pids});
    }
    resources
}
