//! containerd as three releases of Debian have it, each with its runc, and the network plugins: for
//! tests, unpacked into the cache and never installed.

use super::apt::PrivateApt;
use crate::cache::{Cache, key};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// To be counted up when what is made here changes.
const FORMAT: &str = "1";
/// The releases of Debian, with containerd 1.6, 1.7 and 2.x.
const RELEASES: &[&str] = &["bookworm", "trixie", "sid"];
const PACKAGES: &[&str] = &["containerd", "runc"];
const PROGRAMS: &[&str] =
    &["usr/bin/containerd", "usr/bin/containerd-shim-runc-v2", "usr/bin/ctr", "usr/sbin/runc"];

/// The plugins that need nothing but nftables for what they do to the host come with this release.
const PLUGINS_RELEASE: &str = "sid";
const PLUGINS_PACKAGE: &str = "containernetworking-plugins";
const PLUGINS: &[&str] = &["bridge", "host-local", "loopback", "portmap"];

/// A folder with the programs of each release in a folder of its own, named as the release is, and
/// the network plugins in `cni`; made if it is not in the cache yet.
///
/// # Errors
/// Packages cannot be fetched, or the cache cannot be written.
pub fn prepare(cache: &Cache) -> Result<PathBuf> {
    let recipe = format!("{FORMAT}{RELEASES:?}{PACKAGES:?}{PROGRAMS:?}{PLUGINS:?}");
    let name = format!("containerd-{}", key(&[recipe.as_bytes()]));
    cache.entry(&name, "fetching containerd out of three releases of Debian", |folder| {
        let mirror = PrivateApt::open(cache)?.mirror()?;
        for release in RELEASES {
            let apt = PrivateApt::of_release(cache, release, &mirror)?;
            let unpacked = folder.join("packages");
            for package in PACKAGES {
                apt.unpack(package, &unpacked)?;
            }
            take(&unpacked, PROGRAMS, &folder.join(release))?;
            if *release == PLUGINS_RELEASE {
                apt.unpack(PLUGINS_PACKAGE, &unpacked)?;
                take(&unpacked.join("usr/lib/cni"), PLUGINS, &folder.join("cni"))?;
            }
            fs::remove_dir_all(unpacked).context("cannot remove the unpacked packages")?;
        }
        Ok(())
    })
}

/// Moves these files into a folder, which is made.
fn take(from: &Path, files: &[&str], into: &Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("cannot make {}", into.display()))?;
    for file in files {
        let name = Path::new(file).file_name().context("a program without a name")?;
        fs::rename(from.join(file), into.join(name))
            .with_context(|| format!("the packages have no {file}"))?;
    }
    Ok(())
}
