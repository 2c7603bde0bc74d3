//! The layer of the guest without a kernel: built, and run on this machine's /dev/kvm.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::test::{Tally, build_programs, build_test, count_tests};

/// Builds the guest, the programs and the tests, and runs them.
pub(crate) fn run(root: &Path, tally: &mut Tally) -> Result<Option<String>> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        return Ok(Some(format!("/dev/kvm: {error}")));
    }
    let programs = build_programs(root)?;
    let guest = root.join("tests/bare-guest");
    let built = Command::new(env!("CARGO")).args(["build", "--quiet"]).current_dir(guest).status()?;
    ensure!(built.success(), "the bare guest does not build");
    let test = build_test(root, "bare")?;
    // Two machines at a time: what a test waits for must not wait for another test's processor.
    count_tests(Command::new(test).arg("--test-threads=2").env("NACRE_BIN_DIR", programs), tally)?;
    Ok(None)
}
