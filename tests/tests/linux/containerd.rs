//! containerd with Nacre as its runtime, and runc in the same host as the reference.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nacre_tests::containerd::cases::{ALL, Case};
use nacre_tests::containerd::table::{self, markdown};
use nacre_tests::containerd::traces::Traces;
use nacre_tests::containerd::{Containerd, Release, Runtime};

/// Names the file to which the answers of all runtimes are written.
const TABLE: &str = "NACRE_TABLE";

#[test]
fn ctr_answers_as_with_runc_by_containerd_1_7() -> Result<()> {
    compare(Release::Trixie, ALL, &[Runtime::Runc])
}

fn compare(release: Release, cases: &[Case], runtimes: &[Runtime]) -> Result<()> {
    let daemon = Containerd::start(release)?;
    let folder = daemon.path("");
    let before = Traces::now(&folder)?;
    let answers = table::run(&daemon, cases, runtimes)?;
    println!("{answers:?}");
    if let Some(file) = env::var_os(TABLE) {
        let text = markdown(&daemon.version()?, &answers);
        fs::write(Path::new(&file), text).context("cannot write the table")?;
    }
    before.and_nothing_more(&folder)?;
    daemon.stop()?;
    answers.iter().try_for_each(table::Answers::agree)
}
