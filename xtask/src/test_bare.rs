//! The layer of the guest without a kernel, on this machine's /dev/kvm or on the KVM host.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::host::probe::{KvmClass, probe};
use crate::programs::Programs;
use crate::report::say;
use crate::test::{Tally, build_bare_guest, build_test, count_tests};

/// Builds the guest, the programs and the tests, and runs them.
pub(crate) fn run(root: &Path, filter: &[String], tally: &mut Tally) -> Result<()> {
    let programs = Programs::build()?;
    build_bare_guest(root)?;
    let test = build_test(root, "bare")?;
    let class = probe();
    let mut command = match class {
        KvmClass::Full | KvmClass::Emulating { .. } => {
            say(&format!("bare guests run on this machine ({class})"));
            Command::new(test)
        }
        _ => {
            // This same program boots a host that has a /dev/kvm.
            let mut command = Command::new(env::current_exe().context("my own program")?);
            command.arg("host").arg("--env");
            command.arg(format!("NACRE_BIN_DIR={}", programs.folder.display()));
            command.arg("--").arg(test);
            command
        }
    };
    // Two machines at a time: what a test waits for must not wait for another's processor.
    command.arg("--test-threads=2").args(filter).env("NACRE_BIN_DIR", programs.folder);
    count_tests(&mut command, tally)
}
