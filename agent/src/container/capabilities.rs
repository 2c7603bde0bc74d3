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

/// What a process needs to install a seccomp filter without no_new_privs (`CAP_SYS_ADMIN`) and to
/// shrink its bounding set afterwards (`CAP_SETPCAP`), beside what it is to have in the end.
pub(crate) fn to_install_filter(wanted: &LinuxCapabilities) -> LinuxCapabilities {
    let more = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend([Capability::SysAdmin, Capability::Setpcap]);
        Some(set)
    };
    let mut sets = wanted.clone();
    sets.set_bounding(more(wanted.bounding()))
        .set_effective(more(wanted.effective()))
        .set_permitted(more(wanted.permitted()));
    sets
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
