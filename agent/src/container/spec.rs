//! An OCI runtime specification from the host, as what libcontainer is to run in this guest.
//!
//! Pure. What the VM makes different is replaced (namespaces, control group), what can't be honoured
//! is refused rather than left out.

use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{
    Hooks, Linux, LinuxCapabilities, LinuxDevice, LinuxDeviceType, LinuxNamespace,
    LinuxNamespaceType, Process, Spec,
};
use serde_json::Value;

use crate::{
    cgroup::{
        devices::{self, Rule},
        limits::{self, LimitError, Setting},
    },
    container::{capabilities, namespaces::Shared},
};

/// The longest specification, in bytes.
pub(crate) const SPEC_BYTES_MAX: usize = 1 << 20;
/// The most arguments or environment entries of a process.
const STRINGS_MAX: usize = 16 << 10;

/// Why a specification can't be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// Too large.
    #[error("a specification of {0} bytes: at most {SPEC_BYTES_MAX} are allowed")]
    TooLarge(usize),
    /// Not what the OCI runtime specification says.
    #[error("not an OCI runtime specification")]
    Parse(#[source] serde_json::Error),
    /// A part that is needed.
    #[error("the specification has no {0}")]
    Missing(&'static str),
    /// A part that the guest can't honour.
    #[error("the guest can't honour {0}")]
    Unsupported(&'static str),
    /// Its limits.
    #[error("can't use its limits")]
    Limits(#[from] LimitError),
    /// A part that makes no sense.
    #[error("{what} is not allowed: {value:?}")]
    Invalid {
        /// Which part.
        what: &'static str,
        /// What it says.
        value: String,
    },
}

/// A disk that becomes a device node of the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskNode {
    /// Path in the container.
    pub(crate) path: PathBuf,
    /// The device's number.
    pub(crate) major: u32,
    /// The device's number.
    pub(crate) minor: u32,
    /// Whether it is to be read only.
    pub(crate) read_only: bool,
}

/// A specification that fits this guest.
#[derive(Clone, Debug)]
pub(crate) struct Amended {
    /// For libcontainer.
    pub(crate) spec: Spec,
    /// What its control group is to be told.
    pub(crate) limits: Vec<Setting>,
    /// Who may use which device.
    pub(crate) devices: Vec<Rule>,
    /// The host's `process` object, which added processes inherit from.
    pub(crate) process: Value,
    /// What the init is to have once its seccomp filter is installed, if that needs more.
    pub(crate) capabilities_after: Option<LinuxCapabilities>,
}

/// Reads and amends the specification of a new container.
pub(crate) fn amend(
    json: &[u8],
    cgroup: PathBuf,
    disks: &[DiskNode],
    shared: &[Shared],
    terminal: bool,
) -> Result<Amended, SpecError> {
    if json.len() > SPEC_BYTES_MAX {
        return Err(SpecError::TooLarge(json.len()));
    }
    let whole: Value = serde_json::from_slice(json).map_err(SpecError::Parse)?;
    let process_value = whole.get("process").filter(|process| process.is_object()).cloned();
    let process_value = process_value.ok_or(SpecError::Missing("process"))?;
    let mut spec: Spec = serde_json::from_value(whole).map_err(SpecError::Parse)?;
    check_root(&spec)?;
    if spec.hooks().as_ref().is_some_and(has_hooks) {
        return Err(SpecError::Unsupported("hooks: they are the host's"));
    }
    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
    amend_linux(&mut linux, cgroup, disks, shared)?;
    let limits = linux.resources().as_ref().map(limits::settings).transpose()?.unwrap_or_default();
    let resources = linux.resources().as_ref();
    let given = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let mut devices = devices::rules(given)?;
    if !devices.is_empty() {
        devices.extend(disks.iter().filter_map(|disk| devices::of_disk(disk.major, disk.minor)));
    }
    linux.set_resources(None);
    let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    let filtered = linux.seccomp().is_some();
    spec.set_hooks(None);
    spec.set_linux(Some(linux));
    let capabilities_after = amend_process(&mut process, terminal, filtered)?;
    spec.set_process(Some(process));
    Ok(Amended { spec, limits, devices, process: process_value, capabilities_after })
}

fn check_root(spec: &Spec) -> Result<(), SpecError> {
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
    if root.path().is_absolute() {
        Ok(())
    } else {
        Err(invalid("a relative root.path", &root.path().to_string_lossy()))
    }
}

fn invalid(what: &'static str, value: &str) -> SpecError {
    SpecError::Invalid { what, value: value.to_owned() }
}

fn has_hooks(hooks: &Hooks) -> bool {
    [
        hooks.prestart(),
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ]
    .into_iter()
    .flatten()
    .any(|list| !list.is_empty())
}

fn amend_linux(
    linux: &mut Linux,
    cgroup: PathBuf,
    disks: &[DiskNode],
    shared: &[Shared],
) -> Result<(), SpecError> {
    check_namespaces(linux.namespaces().as_deref().unwrap_or_default(), shared)?;
    if linux.uid_mappings().is_some() || linux.gid_mappings().is_some() {
        return Err(SpecError::Unsupported("user namespaces"));
    }
    linux.set_namespaces(Some(namespaces(shared)));
    linux.set_cgroups_path(Some(cgroup));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    if disks.is_empty() {
        return Ok(());
    }
    let mut devices = linux.devices().clone().unwrap_or_default();
    for disk in disks {
        devices.retain(|device| *device.path() != disk.path);
        devices.push(device(disk));
    }
    linux.set_devices(Some(devices));
    Ok(())
}

/// A namespace to be joined has no meaning here, but for the network: that is the guest's.
fn check_namespaces(namespaces: &[LinuxNamespace], shared: &[Shared]) -> Result<(), SpecError> {
    for namespace in namespaces {
        match namespace.typ() {
            LinuxNamespaceType::User => return Err(SpecError::Unsupported("user namespaces")),
            LinuxNamespaceType::Time => return Err(SpecError::Unsupported("time namespaces")),
            LinuxNamespaceType::Network => {}
            kind if shared.iter().any(|shared| shared.kind == kind) => {}
            _ if namespace.path().is_some() => {
                return Err(SpecError::Unsupported("namespaces of other containers"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Those of the container's own, but for those that it shares.
fn namespaces(shared: &[Shared]) -> Vec<LinuxNamespace> {
    [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Cgroup,
    ]
    .map(|kind| {
        let mut namespace = LinuxNamespace::default();
        let shared = shared.iter().find(|shared| shared.kind == kind);
        namespace.set_typ(kind).set_path(shared.map(Shared::path));
        namespace
    })
    .into()
}

fn device(disk: &DiskNode) -> LinuxDevice {
    let mut device = LinuxDevice::default();
    device
        .set_path(disk.path.clone())
        .set_typ(LinuxDeviceType::B)
        .set_major(i64::from(disk.major))
        .set_minor(i64::from(disk.minor))
        .set_file_mode(Some(if disk.read_only { 0o440 } else { 0o660 }))
        .set_uid(Some(0))
        .set_gid(Some(0));
    device
}

/// Makes a process fit: its terminal, its standing with the out-of-memory killer, its capabilities.
///
/// Returns what it is to have in the end if it needs more to install a seccomp filter.
pub(crate) fn amend_process(
    process: &mut Process,
    terminal: bool,
    filtered: bool,
) -> Result<Option<LinuxCapabilities>, SpecError> {
    check_strings(process)?;
    process.set_terminal(Some(terminal));
    process.set_command_line(None);
    // The agent's own is -1000, which must not be inherited.
    process.set_oom_score_adj(Some(process.oom_score_adj().unwrap_or(0)));
    if process.apparmor_profile().is_some() || process.selinux_label().is_some() {
        log::debug!("the guest's kernel has no security module: labels are left out");
        process.set_apparmor_profile(None).set_selinux_label(None);
    }
    let wanted = capabilities::complete(process.capabilities().as_ref());
    if filtered && process.no_new_privileges() != Some(true) {
        process.set_capabilities(Some(capabilities::to_install_filter(&wanted)));
        return Ok(Some(wanted));
    }
    process.set_capabilities(Some(wanted));
    Ok(None)
}

fn check_strings(process: &Process) -> Result<(), SpecError> {
    let args = process.args().as_deref().unwrap_or_default();
    let env = process.env().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(SpecError::Missing("process.args"));
    }
    if args.len() > STRINGS_MAX || env.len() > STRINGS_MAX {
        return Err(SpecError::Unsupported("more than 16,384 arguments or variables"));
    }
    if let Some(arg) = args.iter().find(|arg| arg.contains('\0')) {
        return Err(invalid("a zero byte in process.args", arg));
    }
    let is_variable = |entry: &&String| {
        !entry.contains('\0') && entry.split_once('=').is_some_and(|(name, _)| !name.is_empty())
    };
    if let Some(entry) = env.iter().find(|entry| !is_variable(entry)) {
        return Err(invalid("an entry of process.env that is not NAME=VALUE", entry));
    }
    if !Path::new(process.cwd()).is_absolute() {
        return Err(invalid("a relative process.cwd", &process.cwd().to_string_lossy()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "root": { "path": "/run/nacre/root" },
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["A=b"] },
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "network", "path": "/x" }] }
        })
    }

    fn amended(spec: &Value) -> Result<Amended, SpecError> {
        amend(spec.to_string().as_bytes(), PathBuf::from("/nacre/c"), &[], &[], false)
    }

    #[test]
    fn namespaces_and_control_group_are_the_agents() {
        let amended = amended(&spec()).unwrap();
        let linux = amended.spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_ref().unwrap(), Path::new("/nacre/c"));
        let kinds: Vec<_> =
            linux.namespaces().as_ref().unwrap().iter().map(|entry| entry.typ()).collect();
        assert!(kinds.contains(&LinuxNamespaceType::Cgroup));
        assert!(!kinds.contains(&LinuxNamespaceType::Network));
    }

    #[test]
    fn the_agents_own_standing_and_capabilities_are_not_inherited() {
        let amended = amended(&spec()).unwrap();
        let process = amended.spec.process().as_ref().unwrap();
        assert_eq!(process.oom_score_adj(), Some(0));
        let capabilities = process.capabilities().as_ref().unwrap();
        assert!(capabilities.effective().as_ref().unwrap().is_empty());
        assert!(capabilities.bounding().as_ref().unwrap().is_empty());
        assert_eq!(amended.capabilities_after, None);
    }

    #[test]
    fn a_filter_without_no_new_privs_needs_capabilities_until_it_is_installed() {
        let mut spec = spec();
        spec["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
        let kept = amended(&spec).unwrap();
        assert!(kept.capabilities_after.unwrap().effective().as_ref().unwrap().is_empty());
        let process = kept.spec.process().as_ref().unwrap();
        assert!(!process.capabilities().as_ref().unwrap().effective().as_ref().unwrap().is_empty());
        spec["process"]["noNewPrivileges"] = json!(true);
        assert_eq!(amended(&spec).unwrap().capabilities_after, None);
    }

    #[test]
    fn a_shared_namespace_takes_the_place_of_an_own_one() {
        let mut spec = spec();
        spec["linux"]["namespaces"] = json!([{ "type": "ipc", "path": "/proc/1/ns/ipc" }]);
        let shared = [Shared::of_tests(LinuxNamespaceType::Ipc)];
        let cgroup = PathBuf::from("/nacre/c");
        let json = spec.to_string();
        let amended = amend(json.as_bytes(), cgroup, &[], &shared, false).unwrap();
        let linux = amended.spec.linux().as_ref().unwrap();
        for namespace in linux.namespaces().as_ref().unwrap() {
            let is_shared = namespace.typ() == LinuxNamespaceType::Ipc;
            assert_eq!(namespace.path().clone(), is_shared.then(|| shared[0].path()));
        }
    }

    #[test]
    fn what_a_guest_cannot_honour_is_refused() {
        let cases = [
            ("/linux/namespaces", json!([{ "type": "user" }])),
            ("/linux/namespaces", json!([{ "type": "ipc", "path": "/proc/1/ns/ipc" }])),
            ("/process/args", json!([])),
            ("/process/env", json!(["=x"])),
            ("/process/env", json!(["novalue"])),
            ("/process/cwd", json!("home")),
            ("/root/path", json!("rootfs")),
        ];
        for (pointer, value) in cases {
            let mut spec = spec();
            *spec.pointer_mut(pointer).unwrap() = value.clone();
            assert!(amended(&spec).is_err(), "{pointer} = {value}");
        }
        let mut hooked = spec();
        hooked["hooks"] = json!({ "createRuntime": [{ "path": "/bin/true" }] });
        assert!(matches!(amended(&hooked), Err(SpecError::Unsupported(_))));
    }

    #[test]
    fn a_disk_becomes_a_device_of_its_number() {
        let disk =
            DiskNode { path: PathBuf::from("/dev/data"), major: 254, minor: 16, read_only: true };
        let json = spec().to_string();
        let amended =
            amend(json.as_bytes(), PathBuf::from("/nacre/c"), &[disk], &[], false).unwrap();
        let linux = amended.spec.linux().as_ref().unwrap();
        let device = &linux.devices().as_ref().unwrap()[0];
        assert_eq!((device.major(), device.minor()), (254, 16));
        assert_eq!(device.file_mode(), Some(0o440));
    }

    #[test]
    fn garbage_and_excess_are_refused() {
        let cgroup = || PathBuf::from("/nacre/c");
        assert!(matches!(amend(b"{", cgroup(), &[], &[], false), Err(SpecError::Parse(_))));
        let large = vec![b' '; SPEC_BYTES_MAX + 1];
        assert!(matches!(amend(&large, cgroup(), &[], &[], false), Err(SpecError::TooLarge(_))));
    }
}
