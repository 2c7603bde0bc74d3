//! A bundle's specification, which is for a container on this host, as one for a container in a
//! guest. Pure: what is at a path of the host is asked of a [`Look`].
//!
//! The root file system and each folder and file that is bound into the container are bound below
//! the pod's share first (see `share`), and the specification names where the guest sees them. What
//! the kernel makes by itself (proc, tmpfs and their like) is the guest's kernel's. What is the
//! host's alone goes: the network namespace, processors by number, security labels. What would be
//! something else than was asked for is refused.

use std::{
    io,
    path::{Path, PathBuf},
};

use nacre_proto::agent::SharedNamespace;
use oci_spec::runtime::{
    Hooks, Linux, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Spec,
};

use crate::plan::POD_MEMORY;

/// The file systems that a kernel makes by itself.
const OF_KERNEL: [&str; 7] = ["proc", "sysfs", "tmpfs", "mqueue", "devpts", "cgroup", "cgroup2"];
/// The most mounts of one container.
const MOST_MOUNTS: usize = 1024;

/// Why a specification can't be followed.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A part is missing.
    #[error("the specification has no {0}")]
    Missing(&'static str),
    /// A part is none that a guest could follow.
    #[error("the specification's {0} can't be followed in a guest")]
    Unsupported(&'static str),
    /// A mount is of a kind that there is not in a guest.
    #[error("the mount at {} is of the kind `{kind}`, which there is not in a guest", at.display())]
    Kind {
        /// Where it was to be.
        at: PathBuf,
        /// Which kind.
        kind: String,
    },
    /// Mounts in the guest can't come to the host.
    #[error("the mount at {} is shared with the host, which no guest can", .0.display())]
    Shared(PathBuf),
    /// What is to be mounted is not there.
    #[error("the mount at {}: {} can't be used", at.display(), from.display())]
    Source {
        /// Where it was to be.
        at: PathBuf,
        /// What was to be there.
        from: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Too many mounts.
    #[error("{0} mounts are more than a container can have")]
    TooMany(usize),
}

/// What is at a path of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A folder.
    Folder,
    /// A file, or anything else that has a name and is no folder.
    File,
    /// A block device.
    Disk,
}

/// Looks what is at a path of the host.
pub(super) type Look<'a> = &'a dyn Fn(&Path) -> io::Result<Kind>;

/// Something of the host's that is bound below the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bind {
    /// On the host.
    pub(super) from: PathBuf,
    pub(super) is_folder: bool,
    /// With what is mounted in it.
    pub(super) is_whole: bool,
    pub(super) read_only: bool,
    /// Whether what the host mounts in it later is to be seen.
    pub(super) follows: bool,
}

/// A block device of the host's that is to be one of the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskBind {
    /// On the host.
    pub(super) path: PathBuf,
    /// In the container.
    pub(super) place: PathBuf,
    pub(super) read_only: bool,
}

/// A specification for the guest, and what has to be there for it.
#[derive(Debug)]
pub(super) struct Amended {
    pub(super) spec: Spec,
    /// Number N is at `volumes/N` in the container's folder below the share.
    pub(super) binds: Vec<Bind>,
    pub(super) disks: Vec<DiskBind>,
    pub(super) namespaces: Vec<SharedNamespace>,
}

/// Where things are for the container.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places<'a> {
    /// The container's id.
    pub(super) id: &'a str,
    /// Its folder below the share, as the guest sees it.
    pub(super) folder: &'a str,
    /// Whose the namespaces are that have a path; empty: the sandbox's own.
    pub(super) sandbox: &'a str,
}

/// Amends the specification.
pub(super) fn amend(spec: Spec, places: Places<'_>, look: Look<'_>) -> Result<Amended, SpecError> {
    let mut amended =
        Amended { spec, binds: Vec::new(), disks: Vec::new(), namespaces: Vec::new() };
    let spec = &mut amended.spec;
    if spec.hooks().as_ref().is_some_and(has_hooks) {
        return Err(SpecError::Unsupported("hooks"));
    }
    spec.set_hooks(None);
    let root = spec.root_mut().as_mut().ok_or(SpecError::Missing("root"))?;
    root.set_path(format!("{}/rootfs", places.folder).into());
    let process = spec.process_mut().as_mut().ok_or(SpecError::Missing("process"))?;
    process.set_apparmor_profile(None).set_selinux_label(None);
    let mut linux = spec.linux_mut().take().ok_or(SpecError::Missing("linux"))?;
    let mounts = spec.mounts_mut().take().unwrap_or_default();
    if mounts.len() > MOST_MOUNTS {
        return Err(SpecError::TooMany(mounts.len()));
    }
    amended.namespaces = namespaces(&mut linux, places);
    linux.set_cgroups_path(Some(format!("/nacre/{}", places.id).into()));
    linux.set_mount_label(None).set_rootfs_propagation(None).set_intel_rdt(None);
    amended.take_devices(&mut linux);
    if let Some(resources) = linux.resources_mut() {
        without_host(resources);
    }
    let mut kept = Vec::new();
    for mount in mounts {
        kept.extend(amended.take_mount(mount, places.folder, look)?);
    }
    amended.spec.set_linux(Some(linux)).set_mounts(Some(kept));
    Ok(amended)
}

fn has_hooks(hooks: &Hooks) -> bool {
    let all = [
        hooks.prestart(),
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ];
    all.into_iter().flatten().any(|hooks| !hooks.is_empty())
}

/// The network is the guest's. A namespace that is found by a path is another container's.
fn namespaces(linux: &mut Linux, places: Places<'_>) -> Vec<SharedNamespace> {
    let mut shared = Vec::new();
    let listed = linux.namespaces_mut().take().unwrap_or_default();
    let kept: Vec<LinuxNamespace> = listed
        .into_iter()
        .filter(|namespace| namespace.typ() != LinuxNamespaceType::Network)
        .map(|mut namespace| {
            let kind = match namespace.typ() {
                LinuxNamespaceType::Ipc => "ipc",
                LinuxNamespaceType::Uts => "uts",
                LinuxNamespaceType::Pid => "pid",
                _ => return namespace,
            };
            if namespace.path().is_some() && places.id != places.sandbox {
                shared.push(SharedNamespace {
                    kind: kind.to_owned(),
                    container_id: places.sandbox.to_owned(),
                    ..SharedNamespace::default()
                });
            }
            namespace.set_path(None);
            namespace
        })
        .collect();
    linux.set_namespaces(Some(kept));
    shared
}

/// What counts the host's processors, disks and nics says nothing about the guest's.
pub(super) fn without_host(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None).set_mems(None);
    }
    if let Some(io) = resources.block_io_mut() {
        io.set_weight_device(None)
            .set_throttle_read_bps_device(None)
            .set_throttle_write_bps_device(None)
            .set_throttle_read_iops_device(None)
            .set_throttle_write_iops_device(None);
    }
    resources.set_network(None).set_rdma(None);
}

impl Amended {
    /// Block devices come as disks; the guest has its own numbers for them. Only those that a rule
    /// names were asked for: a privileged container's specification lists all that the host has, its
    /// own root among them, under one rule that allows everything.
    fn take_devices(&mut self, linux: &mut Linux) {
        let Some(devices) = linux.devices_mut() else { return };
        let (disks, others): (Vec<_>, Vec<_>) = std::mem::take(devices)
            .into_iter()
            .partition(|device| device.typ() == LinuxDeviceType::B);
        *devices = others;
        let numbers: Vec<_> = disks.iter().map(|disk| (disk.major(), disk.minor())).collect();
        for disk in disks {
            let numbers = (Some(disk.major()), Some(disk.minor()));
            let rules = linux.resources().as_ref().and_then(|all| all.devices().as_ref());
            let rules = rules.into_iter().flatten();
            let named: Vec<_> = rules
                .filter(|rule| rule.allow() && (rule.major(), rule.minor()) == numbers)
                .collect();
            if named.is_empty() {
                let place = disk.path().display();
                log::warn!("the host's block device {place} is not given: no rule names it");
                continue;
            }
            let is_written = named
                .iter()
                .any(|rule| rule.access().as_ref().is_some_and(|access| access.contains('w')));
            self.disks.push(DiskBind {
                path: format!("/dev/block/{}:{}", disk.major(), disk.minor()).into(),
                place: disk.path().clone(),
                read_only: !is_written,
            });
        }
        if let Some(resources) = linux.resources_mut()
            && let Some(rules) = resources.devices_mut()
        {
            rules.retain(|rule| {
                let named = rule.major().zip(rule.minor());
                rule.typ() != Some(LinuxDeviceType::B)
                    || named.is_none_or(|named| !numbers.contains(&named))
            });
        }
    }

    /// Gives what is left of a mount for the guest.
    fn take_mount(
        &mut self,
        mut mount: Mount,
        folder: &str,
        look: Look<'_>,
    ) -> Result<Option<Mount>, SpecError> {
        let at = mount.destination().clone();
        let mut options = mount.options().clone().unwrap_or_default();
        let has = |options: &[String], names: &[&str]| {
            options.iter().any(|option| names.contains(&&**option))
        };
        let kind = mount.typ().clone().unwrap_or_default();
        if kind != "bind" && !has(&options, &["bind", "rbind"]) {
            if OF_KERNEL.contains(&&*kind) {
                return Ok(Some(mount));
            }
            return Err(SpecError::Kind { at, kind });
        }
        let from = mount.source().clone().ok_or(SpecError::Missing("source of a mount"))?;
        if at == Path::new("/dev/shm") && is_pod_shm(&from) {
            mount.set_source(Some(POD_MEMORY.into()));
            return Ok(Some(mount));
        }
        if has(&options, &["shared", "rshared"]) {
            return Err(SpecError::Shared(at));
        }
        let read_only = has(&options, &["ro", "rro"]);
        let found = look(&from);
        let failed = |source| SpecError::Source { at: at.clone(), from: from.clone(), source };
        let found = match found.map_err(failed)? {
            Kind::Disk => {
                self.disks.push(DiskBind { path: from, place: at, read_only });
                return Ok(None);
            }
            found => found,
        };
        let source = format!("{folder}/volumes/{}", self.binds.len());
        self.binds.push(Bind {
            from,
            is_folder: found == Kind::Folder,
            is_whole: !has(&options, &["bind"]),
            read_only,
            follows: has(&options, &["slave", "rslave"]),
        });
        if !has(&options, &["bind", "rbind"]) {
            options.push("rbind".to_owned());
        }
        mount.set_source(Some(source.into())).set_typ(Some("bind".to_owned()));
        mount.set_options(Some(options));
        Ok(Some(mount))
    }
}

/// containerd makes it at `.../sandboxes/ID/shm`.
fn is_pod_shm(from: &Path) -> bool {
    let above = from.parent().and_then(Path::parent);
    from.ends_with("shm") && above.is_some_and(|above| above.ends_with("sandboxes"))
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
