//! Single packages, unpacked into the cache and not installed, by a private apt state.
//!
//! Where packages come from is the machine's own apt configuration; no mirror is named here, and
//! neither the machine's lists nor its sources are touched.

use crate::cache::Cache;
use crate::tool::output;
use anyhow::{Context, Result, bail};
use std::cmp::Ordering;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The keys of every release that Debian supports.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An apt state of our own, with fresh lists; locked while it exists.
#[derive(Debug)]
pub struct PrivateApt {
    folder: PathBuf,
    /// Sources of our own; without them the machine's are used.
    sources: Option<PathBuf>,
    _lock: File,
}

impl PrivateApt {
    /// Makes the state if needed and fetches the package lists.
    ///
    /// # Errors
    /// The cache cannot be written, or the lists cannot be fetched.
    pub fn open(cache: &Cache) -> Result<Self> {
        let apt = Self::new(cache, "apt")?;
        apt.update()?;
        Ok(apt)
    }

    /// The same for another release of Debian than the machine's, from the machine's mirror.
    ///
    /// # Errors
    /// The cache cannot be written, or the lists cannot be fetched.
    pub fn of_release(cache: &Cache, release: &str, mirror: &str) -> Result<Self> {
        let mut apt = Self::new(cache, &format!("apt-{release}"))?;
        let sources = apt.folder.join("sources.list");
        let line = format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {release} main\n");
        fs::write(&sources, line).context("cannot write the apt sources")?;
        apt.sources = Some(sources);
        apt.update()?;
        Ok(apt)
    }

    fn new(cache: &Cache, name: &str) -> Result<Self> {
        let folder = cache.folder(name)?;
        let lock = cache.lock(name)?;
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part)).context("cannot make the apt state")?;
        }
        Ok(Self { folder, sources: None, _lock: lock })
    }

    fn update(&self) -> Result<()> {
        output(self.command("apt-get").args(["--error-on=any", "update"]))
            .context("cannot fetch the package lists")?;
        Ok(())
    }

    /// Where the machine's own release comes from; other releases of Debian are at the same place.
    ///
    /// # Errors
    /// The machine has no such source.
    pub fn mirror(&self) -> Result<String> {
        let format = ["--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"];
        let targets = output(self.command("apt-get").arg("indextargets").args(format))
            .context("cannot list the apt sources")?;
        mirror_of(&targets).context("the machine's apt sources name no Debian release")
    }

    /// The newest package whose name starts and ends like this.
    ///
    /// # Errors
    /// There is none.
    pub fn newest(&self, start: &str, end: &str) -> Result<String> {
        let names = output(self.command("apt-cache").args(["pkgnames", start]))?;
        let found =
            names.lines().filter(|name| name.ends_with(end)).max_by(|a, b| by_version(a, b));
        found.map(str::to_owned).with_context(|| format!("no Debian package {start}*{end}"))
    }

    /// Fetches a package and unpacks it into the folder, which is made.
    ///
    /// # Errors
    /// The package cannot be fetched or unpacked.
    pub fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        fs::create_dir_all(into).with_context(|| format!("cannot make {}", into.display()))?;
        let here = into.join(".package");
        fs::create_dir_all(&here).with_context(|| format!("cannot make {}", here.display()))?;
        output(self.command("apt-get").args(["download", package]).current_dir(&here))
            .with_context(|| format!("cannot fetch the package {package}"))?;
        let Some(file) = fs::read_dir(&here)?.next() else { bail!("{package} was not fetched") };
        output(Command::new("dpkg-deb").arg("-x").arg(file?.path()).arg(into))
            .with_context(|| format!("cannot unpack the package {package}"))?;
        fs::remove_dir_all(&here).with_context(|| format!("cannot remove {}", here.display()))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let option =
            |name: &str, part: &str| format!("{name}={}", self.folder.join(part).display());
        command.args(["-o", &option("Dir::State", "")]);
        command.args(["-o", &option("Dir::State::lists", "lists")]);
        command.args(["-o", &option("Dir::Cache", "cache")]);
        // The state may lie where the user _apt cannot write.
        command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]);
        if let Some(sources) = &self.sources {
            let list = format!("Dir::Etc::sourcelist={}", sources.display());
            command.args(["-o", &list, "-o", "Dir::Etc::sourceparts=-"]);
            // The lists are fresh; a machine whose clock runs ahead must not stop the command.
            command.args(["-o", "Acquire::Check-Valid-Until=false"]);
        }
        command
    }
}

/// A release's main place is the one whose code name has no suffix ("-security", "-updates").
fn mirror_of(targets: &str) -> Option<String> {
    let mut pairs = targets.lines().filter_map(|line| line.split_once(' '));
    pairs.find(|(name, _)| !name.is_empty() && !name.contains('-')).map(|(_, uri)| uri.to_owned())
}

/// Compares names that differ in their version: runs of digits by value, the rest as text.
fn by_version(a: &str, b: &str) -> Ordering {
    parts(a).cmp(&parts(b))
}

fn parts(name: &str) -> Vec<(u64, &str)> {
    let is_digit = |c: char| c.is_ascii_digit();
    name.split_inclusive(|c: char| !is_digit(c))
        .map(|part| {
            let digits = part.trim_end_matches(|c: char| !is_digit(c));
            (digits.parse().unwrap_or(0), &part[digits.len()..])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_is_by_number_not_by_letter() {
        let names = ["linux-image-6.12.9+deb12-cloud", "linux-image-6.12.117+deb12-cloud"];
        assert_eq!(by_version(names[0], names[1]), Ordering::Less);
        assert_eq!(by_version(names[1], names[1]), Ordering::Equal);
    }

    #[test]
    fn the_mirror_is_that_of_the_release_itself() {
        let targets = "bookworm-security http://s.example/sec/\n http://x.example/\n\
                       bookworm http://m.example/debian/\n";
        assert_eq!(mirror_of(targets).unwrap(), "http://m.example/debian/");
        assert_eq!(mirror_of("bookworm-security http://s.example/\n"), None);
    }
}
