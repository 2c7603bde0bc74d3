//! Capability sets as an OCI specification has them; pure.

use std::collections::HashSet;

use libcontainer::oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

fn sets(each: &Capabilities) -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(each.clone()))
        .set_effective(Some(each.clone()))
        .set_permitted(Some(each.clone()))
        .set_inheritable(Some(HashSet::new()))
        .set_ambient(Some(HashSet::new()));
    sets
}

/// Every capability that the specification knows.
pub(crate) fn all() -> LinuxCapabilities {
    sets(&every())
}

/// All five sets: one that is absent is empty, none is inherited from the agent.
pub(crate) fn complete(wanted: Option<&LinuxCapabilities>) -> LinuxCapabilities {
    let mut sets = sets(&HashSet::new());
    if let Some(wanted) = wanted {
        let set = |set: &Option<Capabilities>| Some(set.clone().unwrap_or_default());
        sets.set_bounding(set(wanted.bounding()))
            .set_effective(set(wanted.effective()))
            .set_permitted(set(wanted.permitted()))
            .set_inheritable(set(wanted.inheritable()))
            .set_ambient(set(wanted.ambient()));
    }
    sets
}

/// What is left to an added process that runs as another user than root: as after setuid(2), only
/// the bounding set, for programs that gain capabilities when they are executed.
pub(crate) fn of_ordinary_user(wanted: Option<&LinuxCapabilities>) -> LinuxCapabilities {
    let mut sets = sets(&HashSet::new());
    sets.set_bounding(complete(wanted).bounding().clone());
    sets
}

fn every() -> Capabilities {
    [
        Capability::AuditControl,
        Capability::AuditRead,
        Capability::AuditWrite,
        Capability::BlockSuspend,
        Capability::Bpf,
        Capability::CheckpointRestore,
        Capability::Chown,
        Capability::DacOverride,
        Capability::DacReadSearch,
        Capability::Fowner,
        Capability::Fsetid,
        Capability::IpcLock,
        Capability::IpcOwner,
        Capability::Kill,
        Capability::Lease,
        Capability::LinuxImmutable,
        Capability::MacAdmin,
        Capability::MacOverride,
        Capability::Mknod,
        Capability::NetAdmin,
        Capability::NetBindService,
        Capability::NetBroadcast,
        Capability::NetRaw,
        Capability::Perfmon,
        Capability::Setgid,
        Capability::Setfcap,
        Capability::Setpcap,
        Capability::Setuid,
        Capability::SysAdmin,
        Capability::SysBoot,
        Capability::SysChroot,
        Capability::SysModule,
        Capability::SysNice,
        Capability::SysPacct,
        Capability::SysPtrace,
        Capability::SysRawio,
        Capability::SysResource,
        Capability::SysTime,
        Capability::SysTtyConfig,
        Capability::Syslog,
        Capability::WakeAlarm,
    ]
    .into()
}
