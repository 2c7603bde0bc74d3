//! Backends that can't be: the real programs are driven by the end-to-end tests.

use std::{fs, os::unix::fs::PermissionsExt};

use tempfile::TempDir;

use super::*;
use crate::paths::SandboxFiles;

fn disk() -> [DevicePlan; 1] {
    [DevicePlan::Disk { serial: "disk-0".to_owned(), path: "/disk.img".into(), read_only: true }]
}

fn surroundings(folder: &TempDir) -> Surroundings {
    let files = SandboxFiles::new(folder.path().to_owned());
    Surroundings::new(folder.path().to_owned(), files, log::LevelFilter::Info)
}

#[tokio::test]
async fn a_backend_that_ends_at_once_is_reported_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("nacre-blk");
    fs::write(&program, "#!/bin/sh\necho \"got $*\" >&2\nexit 3\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let (mut backends, ends) =
        Backends::start(&disk(), &surroundings(&folder), &BTreeMap::new()).unwrap();
    assert_eq!((ends[0].id.as_str(), ends[0].kind), ("disk-0", "blk"));
    let error = backends.ready().await.unwrap_err().to_string();
    assert!(
        error.starts_with("nacre-blk of `disk-0` ended with code 3; its last words: got --log")
    );
    assert!(
        error.ends_with("--disk /disk.img --serial disk-0 --read-only --lock-wait 0"),
        "{error}"
    );
}

#[tokio::test]
async fn a_backend_that_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Backends::start(&disk(), &surroundings(&folder), &BTreeMap::new()).unwrap_err();
    assert!(error.to_string().starts_with("nacre-blk of `disk-0`: no such program: "), "{error}");
}
