//! Why a sandbox came to nothing or to an early end, and the exit code that says so.

use std::{path::PathBuf, time::Duration};

use nacre_proto::exit::{RunExit, VmmExit};

use crate::{
    agent::AgentError,
    backends::{BackendError, said},
    cgroup::CgroupError,
    child::End,
    fault::Injected,
    network::{NetworkError, namespace::NamespaceError},
    passthrough::PassthroughError,
    registry::RegistryError,
    streams::StreamError,
    vmm::{self, VmmError},
};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The name can't be had, or the record not written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The host gives no network.
    #[error("network")]
    Network(#[from] NetworkError),
    /// The pod's network namespace can't be used.
    #[error("network")]
    Namespace(#[from] NamespaceError),
    /// The host gives no cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A device of the host's can't be given to the guest.
    #[error(transparent)]
    Passthrough(#[from] PassthroughError),
    /// The path of the vsock socket does not fit into a socket address.
    #[error("the path {} is too long for a socket: at most 107 bytes (set NACRE_STATE)", .0.display())]
    SocketPath(PathBuf),
    /// A backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A backend failed before the VMM was there.
    #[error(transparent)]
    BackendStart(BackendError),
    /// The VMM can't be started.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The VMM ended, and why it says it did.
    #[error("{}", vmm_sentence(*end, panic.as_deref(), last_words))]
    VmmEnded {
        /// How.
        end: End,
        /// The last line that it printed.
        last_words: Option<String>,
        /// What the guest's kernel said of its panic, if it did.
        panic: Option<String>,
        /// The last lines that the guest's kernel printed.
        console: Option<String>,
    },
    /// The supervisor's own socket can't be made.
    #[error("no control socket at {}", path.display())]
    Control {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The agent never answered.
    #[error("the guest's agent does not answer: no sign of progress for {} s", waited.as_secs())]
    AgentSilent {
        /// How long nothing happened.
        waited: Duration,
        /// The last lines that the guest's kernel printed.
        console: Option<String>,
    },
    /// The agent answered, and not as it should.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The container's program can't be started.
    #[error("can't run `{program}`")]
    Program {
        /// Which.
        program: String,
        /// Why not.
        source: AgentError,
    },
    /// The streams can't be connected.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A signal came before the container ran.
    #[error("called off by signal {0}")]
    Interrupted(i32),
    /// A test wants it.
    #[error(transparent)]
    Injected(#[from] Injected),
    /// The plan has no container.
    #[error("there is no container to start")]
    NoContainer,
    /// The specification can't be sent.
    #[error("the runtime specification can't be written as JSON")]
    Spec(#[source] serde_json::Error),
    /// The host has no random numbers.
    #[error("the host gives no random numbers")]
    Random(#[source] std::io::Error),
}

fn vmm_sentence(end: End, panic: Option<&str>, last_words: &Option<String>) -> String {
    if let (RunExit::GuestPanic, Some(panic)) = (vmm_exit(end, panic.is_some()), panic) {
        return format!("the guest's kernel panicked: {panic}");
    }
    let what = match vmm::meaning(end) {
        Some(VmmExit::PowerOff) => "the guest powered itself off, which nobody asked for",
        Some(VmmExit::BootFile) => "nacre-vmm can't use the kernel or the initramfs",
        Some(VmmExit::Memory) => "nacre-vmm can't have the guest's memory",
        Some(VmmExit::Kvm) => "nacre-vmm can't use KVM as asked",
        Some(VmmExit::Cpus) => "nacre-vmm can't have that many CPUs",
        Some(VmmExit::Usage) => "nacre-vmm does not understand its command line",
        Some(VmmExit::Backend) => "nacre-vmm lost a backend",
        Some(VmmExit::Reset) => "the guest reset itself, which nobody asked for",
        Some(VmmExit::GuestPanic) => "the guest's kernel panicked",
        Some(VmmExit::GuestCrash) => "the guest crashed",
        Some(VmmExit::Failed) => "nacre-vmm failed",
        Some(VmmExit::Stopped) => "nacre-vmm was stopped",
        None => return format!("nacre-vmm {end}{}", said(last_words)),
    };
    format!("{what}{}", said(last_words))
}

impl SandboxError {
    /// The exit code of `nacre run`, unless [`Self::signal`] gives another.
    #[must_use]
    pub fn exit(&self) -> RunExit {
        match self {
            Self::Registry(error) => error.exit(),
            Self::Network(_) | Self::Namespace(_) => RunExit::Network,
            Self::Cgroup(_) => RunExit::Limits,
            Self::Passthrough(_) => RunExit::Device,
            Self::Backend(BackendError::Child(error)) | Self::Vmm(VmmError::Child(error))
                if error.is_about_program() =>
            {
                RunExit::Program
            }
            Self::BackendStart(_) => RunExit::BackendStart,
            Self::Backend(_) => RunExit::BackendDied,
            Self::Vmm(VmmError::Child(_) | VmmError::Prepare { .. }) => RunExit::VmmDied,
            Self::VmmEnded { end, panic, .. } => vmm_exit(*end, panic.is_some()),
            Self::AgentSilent { .. } | Self::Agent(AgentError::Lost { .. } | AgentError::Mute) => {
                RunExit::AgentSilent
            }
            Self::Program { source, .. } if source.is_not_found() => RunExit::NotFound,
            Self::Program { source, .. } if source.is_not_executable() => RunExit::CannotExecute,
            _ => RunExit::Setup,
        }
    }

    /// The signal that ended it, if one did.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        if let Self::Interrupted(signal) = self { Some(*signal) } else { None }
    }

    /// More lines that help to understand it.
    #[must_use]
    pub fn details(&self) -> Option<String> {
        match self {
            Self::VmmEnded { console, .. } | Self::AgentSilent { console, .. } => {
                console.as_ref().map(|console| format!("the guest's console ends with:\n{console}"))
            }
            _ => None,
        }
    }
}

/// A panic is known from the VMM, or, where the guest had no device yet to tell it by, from the
/// console: the guest resets itself then, by its command line.
fn vmm_exit(end: End, panicked: bool) -> RunExit {
    match vmm::meaning(end) {
        Some(VmmExit::GuestPanic | VmmExit::GuestCrash) => RunExit::GuestPanic,
        Some(VmmExit::Reset | VmmExit::PowerOff) if panicked => RunExit::GuestPanic,
        Some(VmmExit::Reset | VmmExit::PowerOff) => RunExit::GuestLeft,
        Some(VmmExit::Usage) => RunExit::Setup,
        Some(VmmExit::BootFile) => RunExit::BootFile,
        Some(VmmExit::Memory) => RunExit::Memory,
        Some(VmmExit::Cpus) => RunExit::Cpus,
        Some(VmmExit::Kvm) => RunExit::Kvm,
        Some(VmmExit::Backend) => RunExit::BackendDied,
        Some(VmmExit::Failed | VmmExit::Stopped) | None => RunExit::VmmDied,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(end: End) -> SandboxError {
        let last_words = Some("x".to_owned());
        SandboxError::VmmEnded { end, last_words, panic: None, console: None }
    }

    #[test]
    fn each_way_of_ending_has_its_code() {
        let code = |exit: VmmExit| ended(End::Code(exit.into())).exit();
        assert_eq!(code(VmmExit::GuestPanic), RunExit::GuestPanic);
        assert_eq!(code(VmmExit::Reset), RunExit::GuestLeft);
        assert_eq!(code(VmmExit::PowerOff), RunExit::GuestLeft);
        assert_eq!(code(VmmExit::Kvm), RunExit::Kvm);
        assert_eq!(code(VmmExit::Cpus), RunExit::Cpus);
        assert_eq!(code(VmmExit::Memory), RunExit::Memory);
        assert_eq!(code(VmmExit::BootFile), RunExit::BootFile);
        assert_eq!(code(VmmExit::Failed), RunExit::VmmDied);
        assert_eq!(code(VmmExit::Backend), RunExit::BackendDied);
        assert_eq!(ended(End::Signal(9)).exit(), RunExit::VmmDied);
        assert_eq!(ended(End::Code(77)).exit(), RunExit::VmmDied);
    }

    #[test]
    fn a_panic_that_only_the_console_tells_is_one_all_the_same() {
        let panic = Some("not syncing: no init".to_owned());
        for exit in [VmmExit::Reset, VmmExit::PowerOff, VmmExit::GuestPanic] {
            let end = End::Code(exit.into());
            let panic = panic.clone();
            let error = SandboxError::VmmEnded { end, last_words: None, panic, console: None };
            assert_eq!(error.exit(), RunExit::GuestPanic);
            assert_eq!(error.to_string(), "the guest's kernel panicked: not syncing: no init");
        }
        let error =
            SandboxError::VmmEnded { end: End::Signal(9), last_words: None, panic, console: None };
        assert_eq!(error.exit(), RunExit::VmmDied);
    }

    #[test]
    fn an_error_is_one_sentence_with_the_last_words() {
        let error = ended(End::Signal(11));
        assert_eq!(error.to_string(), "nacre-vmm was ended by signal 11; its last words: x");
    }
}
