//! What `nacre run` needs of whoever types it, looked at before anything else is.

use rustix::{
    process::geteuid,
    thread::{CapabilitySet, capabilities},
};

use crate::args::Run;

/// What is missing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotPermitted {
    /// Another user.
    #[error(
        "`nacre run` needs root, for mount namespaces, taps and /dev/kvm, and runs as user {0}: \
         try it with sudo"
    )]
    User(u32),
    /// Root that was robbed, as in a container.
    #[error("`nacre run` needs the capability {0}, which this root does not have")]
    Capability(&'static str),
}

/// Checks the user and its capabilities.
pub(crate) fn check(run: &Run) -> Result<(), NotPermitted> {
    // A kernel that can't tell will refuse by itself what is not permitted.
    let held = capabilities(None).map_or(CapabilitySet::all(), |sets| sets.effective);
    decide(geteuid().as_raw(), held, run.net)
}

fn decide(user: u32, held: CapabilitySet, network: bool) -> Result<(), NotPermitted> {
    if user != 0 {
        return Err(NotPermitted::User(user));
    }
    let always = [(CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN", true)];
    let for_network = [(CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN", network)];
    let missing = [always, for_network]
        .concat()
        .into_iter()
        .find(|(capability, _, needed)| *needed && !held.contains(*capability));
    missing.map_or(Ok(()), |(_, name, _)| Err(NotPermitted::Capability(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_with_what_is_used_is_let_through() {
        let all = CapabilitySet::all();
        assert_eq!(decide(0, all, true), Ok(()));
        assert_eq!(decide(1000, all, false), Err(NotPermitted::User(1000)));
        let no_network = all - CapabilitySet::NET_ADMIN;
        assert_eq!(decide(0, no_network, false), Ok(()));
        assert_eq!(decide(0, no_network, true), Err(NotPermitted::Capability("CAP_NET_ADMIN")));
        let no_mounts = all - CapabilitySet::SYS_ADMIN;
        assert_eq!(decide(0, no_mounts, true), Err(NotPermitted::Capability("CAP_SYS_ADMIN")));
    }
}
