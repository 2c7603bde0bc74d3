//! Fault points: a test makes one step of creating a sandbox fail and looks at what is left.
//!
//! `NACRE_FAIL_AT` names the step. Only builds with debug assertions look at it; in a release
//! build every point is a constant `Ok`.

/// The steps of creating a sandbox that can be made to fail, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The name is claimed and its folder exists.
    Claim,
    /// The network interface and its rules exist.
    Network,
    /// The host's cgroup exists.
    Cgroup,
    /// All backends are started, none is ready yet.
    BackendsSpawned,
    /// All backends are ready.
    BackendsReady,
    /// The VMM is started.
    Vmm,
    /// The agent has answered.
    Agent,
    /// The guest is configured.
    Configure,
    /// The container exists.
    CreateContainer,
    /// The container's streams are connected.
    Streams,
    /// The container's program runs.
    StartContainer,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 11] = [
        Self::Claim,
        Self::Network,
        Self::Cgroup,
        Self::BackendsSpawned,
        Self::BackendsReady,
        Self::Vmm,
        Self::Agent,
        Self::Configure,
        Self::CreateContainer,
        Self::Streams,
        Self::StartContainer,
    ];

    /// What `NACRE_FAIL_AT` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Network => "network",
            Self::Cgroup => "cgroup",
            Self::BackendsSpawned => "backends-spawned",
            Self::BackendsReady => "backends-ready",
            Self::Vmm => "vmm",
            Self::Agent => "agent",
            Self::Configure => "configure",
            Self::CreateContainer => "create-container",
            Self::Streams => "streams",
            Self::StartContainer => "start-container",
        }
    }
}

/// A step failed because a test asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step `{}` fails because NACRE_FAIL_AT asks for it", .0.name())]
pub struct Injected(Step);

/// Fails if a test asked for a failure at `step`.
///
/// # Errors
///
/// See above; never in a build without debug assertions.
pub fn point(step: Step) -> Result<(), Injected> {
    #[cfg(debug_assertions)]
    if std::env::var_os("NACRE_FAIL_AT").is_some_and(|at| at == step.name()) {
        return Err(Injected(step));
    }
    log::debug!("reached step {}", step.name());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_a_name_of_its_own() {
        for (index, step) in Step::ALL.iter().enumerate() {
            assert_eq!(Step::ALL.iter().position(|other| other.name() == step.name()), Some(index));
        }
    }

    #[test]
    fn no_step_fails_unasked() {
        assert_eq!(point(Step::Claim), Ok(()));
    }
}
