//! Specifications as containerd's CRI and `ctr` make them, and what becomes of them.

use serde_json::{Value, json};

use super::*;

const FOLDER: &str = "/run/nacre/pod/web";
const SANDBOXES: &str = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/pause";

fn look(path: &Path) -> io::Result<Kind> {
    match path.to_str().unwrap() {
        path if path.contains("missing") => Err(io::ErrorKind::NotFound.into()),
        "/dev/loop7" => Ok(Kind::Disk),
        path if path.ends_with("hosts") || path.ends_with("log") => Ok(Kind::File),
        _ => Ok(Kind::Folder),
    }
}

fn places<'a>(id: &'a str, sandbox: &'a str) -> Places<'a> {
    Places { id, folder: FOLDER, sandbox }
}

fn amended(spec: &Value) -> Result<Amended, SpecError> {
    amend(serde_json::from_value(spec.clone()).unwrap(), places("web", "pause"), &look)
}

fn bind(from: &str, at: &str, options: &[&str]) -> Value {
    json!({"destination": at, "type": "bind", "source": from, "options": options})
}

/// As containerd 1.7 and 2.1 make it for a container of a pod.
fn cri() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/",
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "a:b:c"},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": []},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["ro"]},
            bind("/var/lib/kubelet/pods/u/volumes/data", "/data", &["rbind", "rprivate", "rw"]),
            bind("/var/lib/kubelet/pods/u/etc-hosts", "/etc/hosts", &["rbind", "rprivate", "ro"]),
            bind("/var/lib/kubelet/pods/u/0.log", "/dev/termination-log", &["rbind", "rw"]),
            bind(&format!("{SANDBOXES}/shm"), "/dev/shm", &["rbind", "rprivate", "rw"]),
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "mount"},
                {"type": "network", "path": "/proc/7/ns/net"}, {"type": "cgroup"},
            ],
            "cgroupsPath": "kubepods-besteffort-podu.slice:cri-containerd:web",
            "mountLabel": "a:b:c",
            "resources": {"cpu": {"shares": 2, "cpus": "0-3", "mems": "0"},
                "memory": {"limit": 1 << 20}, "pids": {"limit": 5}},
        },
    })
}

fn mounts(amended: &Amended) -> Vec<(String, String)> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let mounts = amended.spec.mounts().as_ref().unwrap().iter();
    mounts
        .map(|mount| (text(mount.destination()), text(mount.source().as_ref().unwrap())))
        .collect()
}

#[test]
fn files_and_folders_come_by_the_share_and_the_kernel_s_file_systems_stay() {
    let amended = amended(&cri()).unwrap();
    let root = amended.spec.root().as_ref().unwrap();
    assert_eq!(root.path(), Path::new("/run/nacre/pod/web/rootfs"));
    assert_eq!(root.readonly(), Some(true));
    let by = |(at, from): (&str, &str)| (at.to_owned(), from.to_owned());
    assert_eq!(
        mounts(&amended),
        [
            ("/proc", "proc"),
            ("/dev", "tmpfs"),
            ("/dev/pts", "devpts"),
            ("/dev/mqueue", "mqueue"),
            ("/sys", "sysfs"),
            ("/sys/fs/cgroup", "cgroup"),
            ("/data", "/run/nacre/pod/web/volumes/0"),
            ("/etc/hosts", "/run/nacre/pod/web/volumes/1"),
            ("/dev/termination-log", "/run/nacre/pod/web/volumes/2"),
            ("/dev/shm", POD_MEMORY),
        ]
        .map(by)
    );
    let binds: Vec<_> =
        amended.binds.iter().map(|bind| (bind.is_folder, bind.read_only, bind.is_whole)).collect();
    assert_eq!(binds, [(true, false, true), (false, true, true), (false, false, true)]);
    assert_eq!(amended.binds[1].from, Path::new("/var/lib/kubelet/pods/u/etc-hosts"));
}

#[test]
fn what_is_the_host_s_alone_is_taken_out() {
    let spec = serde_json::to_value(amended(&cri()).unwrap().spec).unwrap();
    assert_eq!(spec["process"]["apparmorProfile"], Value::Null);
    assert_eq!(spec["process"]["selinuxLabel"], Value::Null);
    assert_eq!(spec["linux"]["mountLabel"], Value::Null);
    assert_eq!(spec["linux"]["cgroupsPath"], "/nacre/web");
    let resources = &spec["linux"]["resources"];
    assert_eq!(resources["cpu"], json!({"shares": 2}));
    assert_eq!(
        (&resources["memory"]["limit"], &resources["pids"]["limit"]),
        (&json!(1 << 20), &json!(5))
    );
}

#[test]
fn a_namespace_with_a_path_is_the_sandbox_s_and_the_network_is_the_guest_s() {
    let amended = amended(&cri()).unwrap();
    let shared: Vec<_> =
        amended.namespaces.iter().map(|one| (&*one.kind, &*one.container_id)).collect();
    assert_eq!(shared, [("ipc", "pause"), ("uts", "pause")]);
    let spec = serde_json::to_value(amended.spec).unwrap();
    let left = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        {"type": "cgroup"}]);
    assert_eq!(spec["linux"]["namespaces"], left);
    // The sandbox's own container makes them.
    let of_pause = amend(serde_json::from_value(cri()).unwrap(), places("pause", "pause"), &look);
    assert!(of_pause.unwrap().namespaces.is_empty());
    let without = amend(serde_json::from_value(cri()).unwrap(), places("web", ""), &look).unwrap();
    assert!(without.namespaces.iter().all(|one| one.container_id.is_empty()));
}

#[test]
fn the_memory_of_ctr_is_a_container_s_own_and_so_is_a_volume_in_its_place() {
    let mut spec = cri();
    spec["mounts"] = json!([
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
    ]);
    assert_eq!(mounts(&amended(&spec).unwrap())[0].1, "shm");
    let volume = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/shm";
    spec["mounts"] = json!([bind(volume, "/dev/shm", &["rbind"])]);
    assert_eq!(mounts(&amended(&spec).unwrap())[0].1, "/run/nacre/pod/web/volumes/0");
}

#[test]
fn a_privileged_container_does_not_get_the_hosts_disks() {
    let mut spec = cri();
    spec["linux"]["devices"] = json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
    spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    let amended = amended(&spec).unwrap();
    assert!(amended.disks.is_empty(), "{:?}", amended.disks);
    let spec = serde_json::to_value(amended.spec).unwrap();
    assert!(spec["linux"]["devices"].as_array().is_none_or(Vec::is_empty));
}

#[test]
fn block_devices_become_disks() {
    let mut spec = cri();
    spec["mounts"] = json!([bind("/dev/loop7", "/dev/xvda", &["bind", "ro"])]);
    spec["linux"]["devices"] = json!([
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        {"path": "/dev/pvc", "type": "b", "major": 7, "minor": 3},
    ]);
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rwm"},
    ]);
    let amended = amended(&spec).unwrap();
    let disk = |path: &str, place: &str, read_only| DiskBind {
        path: path.into(),
        place: place.into(),
        read_only,
    };
    assert_eq!(
        amended.disks,
        [disk("/dev/block/7:3", "/dev/pvc", false), disk("/dev/loop7", "/dev/xvda", true)]
    );
    assert!(mounts(&amended).is_empty());
    let spec = serde_json::to_value(amended.spec).unwrap();
    assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
    assert_eq!(spec["linux"]["resources"]["devices"].as_array().unwrap().len(), 1);
}

#[test]
fn what_would_be_something_else_is_refused() {
    let refused = |change: fn(&mut Value)| {
        let mut spec = cri();
        change(&mut spec);
        amended(&spec).unwrap_err().to_string()
    };
    let error = refused(|spec| spec["mounts"] = json!([bind("/missing", "/data", &["rbind"])]));
    assert_eq!(error, "the mount at /data: /missing can't be used");
    let error = refused(|spec| spec["mounts"] = json!([bind("/a", "/data", &["rshared"])]));
    assert_eq!(error, "the mount at /data is shared with the host, which no guest can");
    let error = refused(|spec| {
        spec["mounts"] = json!([{"destination": "/x", "type": "nfs", "source": "a:/b"}]);
    });
    assert_eq!(error, "the mount at /x is of the kind `nfs`, which there is not in a guest");
    let error = refused(|spec| spec["hooks"] = json!({"prestart": [{"path": "/bin/hook"}]}));
    assert_eq!(error, "the specification's hooks can't be followed in a guest");
    let error = refused(|spec| drop(spec.as_object_mut().unwrap().remove("linux")));
    assert_eq!(error, "the specification has no linux");
}
