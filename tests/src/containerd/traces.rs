//! What containers could leave behind on their host, whichever runtime ran them: taken before and
//! after, and compared.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use super::NAMESPACE;
use crate::process::until;

/// How what belongs to containers is called. A bridge stays: the plugin that makes it never takes
/// it away.
const PROCESSES: &[&str] = &["containerd-shim", "runc", "nacre", "ctr"];
const LINKS: &[&str] = &["veth", "nacre-tap", "tap", "nacre0"];
const PLACES: &[&str] = &["/run/containerd", "/run/netns", "/run/nacre"];
const CGROUPS: &str = "/sys/fs/cgroup";

/// Everything on this host that a container makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// What is there now; `folder` is the daemon's own.
    ///
    /// # Errors
    ///
    /// Fails if the kernel can't be asked.
    pub fn now(folder: &Path) -> Result<Self> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let Ok(name) = fs::read_to_string(path.join("comm")) else { continue };
            if PROCESSES.iter().any(|start| name.starts_with(start)) {
                found.insert(format!("process {} {}", name.trim(), path.display()));
            }
        }
        for mount in fs::read_to_string("/proc/thread-self/mountinfo")?.lines() {
            let place = mount.split(' ').nth(4).unwrap_or("");
            let is_ours = Path::new(place).starts_with(folder)
                || PLACES.iter().any(|start| Path::new(place).starts_with(start));
            if is_ours {
                found.insert(format!("mount {place}"));
            }
        }
        for link in fs::read_dir("/sys/class/net")? {
            let name = link?.file_name().to_string_lossy().into_owned();
            if LINKS.iter().any(|start| name.starts_with(start)) {
                found.insert(format!("link {name}"));
            }
        }
        for place in PLACES {
            files(Path::new(place), &mut found);
        }
        for group in [NAMESPACE, "k8s.io", "nacre"] {
            cgroups(&Path::new(CGROUPS).join(group), false, &mut found);
        }
        Ok(Self(found))
    }

    /// Nothing more is there than `self`, at latest after a short while.
    ///
    /// # Errors
    ///
    /// Fails with what is still there.
    pub fn and_nothing_more(&self, folder: &Path) -> Result<()> {
        let mut more = Vec::new();
        let clean = until("nothing left behind", || {
            more = Self::now(folder)?.0.difference(&self.0).cloned().collect();
            Ok(more.is_empty())
        });
        ensure!(clean.is_ok(), "left behind: {more:#?}");
        Ok(())
    }
}

/// Files and sockets; folders are the daemon's, which makes them once and keeps them.
fn files(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path(), found),
            Ok(_) => {
                found.insert(format!("file {}", entry.path().display()));
            }
            // Gone in between.
            Err(_) => {}
        }
    }
}

/// The groups of containers, each within the one of its namespace, which stays.
fn cgroups(folder: &Path, is_containers: bool, found: &mut BTreeSet<String>) {
    if !folder.is_dir() {
        return;
    }
    if is_containers {
        found.insert(format!("cgroup {}", folder.display()));
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            cgroups(&entry.path(), true, found);
        }
    }
}
