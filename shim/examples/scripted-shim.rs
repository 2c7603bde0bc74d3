//! A shim with everything but pods: its guest is the scripted one of the tests. For trying the
//! protocols with a containerd by hand, without KVM:
//!
//! ```text
//! cargo build -p shim --example scripted-shim
//! ln -s $PWD/target/debug/examples/scripted-shim /usr/local/bin/containerd-shim-scripted-v2
//! ctr run --rm --runtime io.containerd.scripted.v2 --rootfs DIR test echo hello
//! ```

#[path = "../tests/service/guest.rs"]
#[expect(dead_code, clippy::unwrap_used, reason = "made for tests")]
mod guest;

use std::{env, process::ExitCode, sync::Arc};

use shim::{
    paths,
    registry::Registry,
    service::command::{self, Parts},
};

fn main() -> ExitCode {
    let parts = Parts {
        host: |_flags| Arc::new(guest::ScriptedHost::default()),
        registry: || Registry::open(paths::state_root()),
    };
    command::run(env::args_os().skip(1), &parts)
}
