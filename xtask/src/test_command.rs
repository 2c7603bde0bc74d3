//! The layer of `cargo xtask run` itself: this program, run by a test program as a user runs it.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{CACHE_VARIABLE, Cache};
use crate::guest_image::{GuestImage, busybox_rootfs};
use crate::host::{Host, NAME_VARIABLE};
use crate::programs::Programs;
use crate::report::say;
use crate::test::{Tally, build_test, count_tests};

/// The emulated host of these tests is theirs alone, whatever else is kept up.
const HOST_NAME: &str = "command-tests";
/// Short enough to be waited for, longer than the time between two tests.
const IDLE_MAX_S: u64 = 15;

/// Builds everything and runs the tests; where this machine's KVM is not full they share one
/// emulated host.
pub(crate) fn run(root: &Path, filter: &[String], tally: &mut Tally) -> Result<()> {
    let cache = Cache::open()?;
    let programs = Programs::build()?;
    let test = build_test(root, "command")?;
    // What is made once is made before: the tests see a second run.
    GuestImage::prepare(&cache, &programs.agent)?;
    let rootfs = busybox_rootfs(&cache)?;
    let host = Host::choose(&cache)?;
    say(&host.describe());
    let own = env::current_exe().context("my own program")?;
    let mut command = Command::new(test);
    command.env("NACRE_XTASK", &own).env("NACRE_ROOTFS", rootfs);
    command.env("NACRE_BIN_DIR", programs.folder).env(CACHE_VARIABLE, cache.root());
    command.env(NAME_VARIABLE, HOST_NAME);
    if matches!(host, Host::Emulated(..)) {
        command.env("NACRE_HOST_IDLE", IDLE_MAX_S.to_string());
    }
    command.arg("--test-threads=1").args(filter);
    let counted = count_tests(&mut command, tally);
    if matches!(host, Host::Emulated(..)) {
        let mut down = Command::new(own);
        let ended = down.args(["host", "down"]).env(NAME_VARIABLE, HOST_NAME).status();
        ended.context("cannot take the tests' host down")?;
    }
    counted
}
