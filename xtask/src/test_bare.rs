//! The layer of the guest without a kernel, on this machine's /dev/kvm, whatever it is good for, or
//! in the emulated host where there is none.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::host::probe::{KvmClass, probe};
use crate::host::{HOST_VARIABLE, forced};
use crate::programs::Programs;
use crate::report::say;
use crate::test::{Tally, build_bare_guest, build_test, count_tests};

/// Builds the guest, the programs and the tests, and runs them.
pub(crate) fn run(root: &Path, filter: &[String], tally: &mut Tally) -> Result<()> {
    let programs = Programs::build()?;
    build_bare_guest(root)?;
    let test = build_test(root, "bare")?;
    let class = probe();
    let usable = matches!(class, KvmClass::Full | KvmClass::Emulating { .. });
    let mut command = if forced()?.unwrap_or(usable) {
        say(&format!("bare guests run on this machine ({class})"));
        Command::new(test)
    } else {
        // This same program boots a host that has a /dev/kvm.
        let mut command = Command::new(env::current_exe().context("my own program")?);
        command.env(HOST_VARIABLE, "emulated");
        command.arg("host").arg("--bind").arg(&programs.folder).arg("--env");
        command.arg(format!("NACRE_BIN_DIR={}", programs.folder.display()));
        command.arg("--").arg(test);
        command
    };
    // Two machines at a time: what a test waits for must not wait for another's processor.
    command.arg("--test-threads=2").args(filter).env("NACRE_BIN_DIR", programs.folder);
    count_tests(&mut command, tally)
}
