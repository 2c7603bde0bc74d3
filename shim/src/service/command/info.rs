//! `-info` and `-v`: what this runtime is and can.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Value, json};

use super::RUNTIME;
use crate::service::events::bytes;

/// By containerd's name for the type, whose value is JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(super) fn version() -> String {
    format!("containerd-shim-nacre-v2:\n  Version: {}\n", env!("CARGO_PKG_VERSION"))
}

pub(super) fn info() -> Vec<u8> {
    let mut info = RuntimeInfo::new();
    info.set_name(RUNTIME.to_owned());
    let mut version = RuntimeVersion::new();
    version.set_version(env!("CARGO_PKG_VERSION").to_owned());
    info.set_version(version);
    let value = features().to_string().into_bytes();
    info.features = MessageField::some(Any { type_url: FEATURES.to_owned(), value, ..Any::new() });
    bytes(&info)
}

/// The features of the OCI runtime specification: those of the runtime in the guest, as far as
/// something decides by them.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "iversion",
            "mand", "noatime", "nodev", "nodiratime", "noexec", "noiversion", "nomand",
            "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime", "remount",
            "ro", "rprivate", "rro", "rshared", "rslave", "runbindable", "rw", "shared", "slave",
            "strictatime", "suid", "sync", "unbindable",
        ],
        "linux": {
            // No user namespaces: so containerd refuses pods that want one.
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
    })
}

#[cfg(test)]
mod tests {
    use protobuf::Message;

    use super::*;

    #[test]
    fn the_features_are_a_specification_of_features() {
        let info = RuntimeInfo::parse_from_bytes(&info()).unwrap();
        assert_eq!(info.name, RUNTIME);
        assert_eq!(info.features.type_url, FEATURES);
        let features: oci_spec::runtime::Features =
            serde_json::from_slice(&info.features.value).unwrap();
        assert!(features.mount_options().as_ref().unwrap().contains(&"rro".to_owned()));
    }
}
