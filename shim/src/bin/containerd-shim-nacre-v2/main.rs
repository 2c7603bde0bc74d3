//! containerd's way to Nacre: runtime `io.containerd.nacre.v2`. Arguments, one action, a reply, an exit
//! code; see [`shim::service`].

use std::{env, process::ExitCode, sync::Arc};

use log::LevelFilter;
use shim::{
    paths,
    registry::Registry,
    service::{
        PodHost,
        command::{self, Parts},
    },
};

fn main() -> ExitCode {
    let parts = Parts {
        host: |flags| {
            let level = if flags.debug { LevelFilter::Debug } else { LevelFilter::Info };
            Arc::new(PodHost::from_environment(level))
        },
        registry: || Registry::open(paths::state_root()),
    };
    command::run(env::args_os().skip(1), &parts)
}
