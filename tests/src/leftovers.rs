//! What a sandbox could leave behind on its host: taken before and after, and compared.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::process::until;

/// Everything on this host that a sandbox makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// What is there now.
    ///
    /// # Errors
    ///
    /// Fails if the kernel can't be asked.
    pub fn now(state: &Path) -> Result<Self> {
        let mut found = BTreeSet::new();
        found.extend(processes()?);
        for mount in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            found.insert(format!("mount {}", mount.split(' ').nth(4).unwrap_or("")));
        }
        for link in fs::read_dir("/sys/class/net")? {
            found.insert(format!("link {}", link?.file_name().to_string_lossy()));
        }
        for rules in ["nft list tables", "ip route"] {
            let mut words = rules.split(' ');
            let output = Command::new(words.next().unwrap_or_default()).args(words).output();
            let text = output.map(|output| output.stdout).unwrap_or_default();
            found.extend(
                String::from_utf8_lossy(&text).lines().map(|line| format!("{rules}: {line}")),
            );
        }
        walk(state, &mut found)?;
        cgroups(Path::new("/sys/fs/cgroup"), &mut found);
        Ok(Self(found))
    }

    /// Nothing more is there than `self`, at latest after a short while: the kernel ends
    /// processes and links in its own time.
    ///
    /// # Errors
    ///
    /// Fails with what is still there.
    pub fn and_nothing_more(&self, state: &Path) -> Result<()> {
        let mut more = Vec::new();
        let clean = until("nothing left behind", || {
            more = Self::now(state)?.0.difference(&self.0).cloned().collect();
            Ok(more.is_empty())
        });
        ensure!(clean.is_ok(), "left behind: {more:#?}");
        Ok(())
    }
}

fn processes() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(name) = fs::read_to_string(path.join("comm")) else { continue };
        if name.starts_with("nacre") {
            found.insert(format!("process {} {}", name.trim(), path.display()));
        }
    }
    Ok(found)
}

fn walk(dir: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        found.insert(format!("file {}", entry.path().display()));
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), found)?;
        }
    }
    Ok(())
}

fn cgroups(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.insert(format!("cgroup {}", entry.path().display()));
            cgroups(&entry.path(), found);
        }
    }
}
