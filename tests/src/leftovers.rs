//! What a sandbox could leave behind on its host: taken before and after, and compared.
//!
//! Only what carries Nacre's name, or is in the state folder, or decides about the host's
//! forwarding: a machine's other programs come and go meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process::until;

/// How everything that is Nacre's is called: processes, interfaces, tables, cgroups.
const NAME: &str = "nacre";
const CGROUPS: &str = "/sys/fs/cgroup";

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
        for mount in fs::read_to_string("/proc/thread-self/mountinfo")?.lines() {
            let place = Path::new(mount.split(' ').nth(4).unwrap_or(""));
            if place.starts_with(state) || place.to_string_lossy().contains(NAME) {
                found.insert(format!("mount {}", place.display()));
            }
        }
        for link in fs::read_dir("/sys/class/net")? {
            let name = link?.file_name().to_string_lossy().into_owned();
            if name.starts_with(NAME) {
                found.insert(format!("link {name}"));
            }
        }
        for rules in ["nft list tables", "ip route", "ip rule"] {
            found.extend(named_lines(rules));
        }
        found.extend(forwarding()?);
        walk(state, &mut found)?;
        cgroups(&Path::new(CGROUPS).join(NAME), &mut found);
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
        if name.starts_with(NAME) {
            found.insert(format!("process {} {}", name.trim(), path.display()));
        }
    }
    Ok(found)
}

/// The lines with Nacre's name that a program prints; none where it is not installed.
fn named_lines(command: &str) -> Vec<String> {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap_or_default()).args(words).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().filter(|line| line.contains(NAME));
    lines.map(|line| format!("{command}: {line}")).collect()
}

/// The switches that are on: the host's own, those for interfaces to come, and those of the ways
/// out, by which a sandbox's packets leave.
fn forwarding() -> Result<Vec<String>> {
    let routes = fs::read_to_string("/proc/thread-self/net/route").context("the routes")?;
    let ways_out = routes.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (name, to) = (fields.next()?, fields.next()?);
        (to == "00000000").then_some(name)
    });
    let mut on = Vec::new();
    for interface in ["all", "default"].into_iter().chain(ways_out) {
        for family in ["ipv4", "ipv6"] {
            let switch = format!("/proc/sys/net/{family}/conf/{interface}/forwarding");
            // A host without this family, or an interface that just left, forwards nothing.
            if fs::read_to_string(&switch).is_ok_and(|value| value.trim() != "0") {
                on.push(format!("switched on {switch}"));
            }
        }
    }
    Ok(on)
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
    if !dir.is_dir() {
        return;
    }
    found.insert(format!("cgroup {}", dir.display()));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            cgroups(&entry.path(), found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_make_is_not_looked_at_and_what_is_ours_is_found() -> Result<()> {
        let state = tempfile::tempdir()?;
        let before = Leftovers::now(state.path())?;
        let foreign = tempfile::tempdir()?;
        fs::write(foreign.path().join("file"), "")?;
        before.and_nothing_more(state.path())?;
        fs::create_dir(state.path().join("box"))?;
        let found = Leftovers::now(state.path())?;
        ensure!(found.0.difference(&before.0).count() == 1, "{found:?}");
        Ok(())
    }
}
