//! containerd's way to Nacre: runtime `io.containerd.nacre.v2`. Arguments, one action, a reply, an exit
//! code; see [`shim::service`].

use std::{env, process::ExitCode, sync::Arc};

use async_trait::async_trait;
use shim::{
    paths,
    registry::Registry,
    service::{
        command::{self, Parts},
        guest::{Guest, GuestError, GuestErrorKind, Host, SandboxSettings},
    },
};

/// What answers until pods can be started.
struct NotThereYet;

#[async_trait]
impl Host for NotThereYet {
    async fn launch(&self, _: SandboxSettings) -> Result<Arc<dyn Guest>, GuestError> {
        let why = "this version of Nacre starts no pods yet";
        Err(GuestError::new(GuestErrorKind::Unimplemented, why))
    }
}

fn main() -> ExitCode {
    let parts = Parts {
        host: |_flags| Arc::new(NotThereYet),
        registry: || Registry::open(paths::state_root()),
    };
    command::run(env::args_os().skip(1), &parts)
}
