//! The packages that must be installed on the machine itself: few, and never a kernel.

use crate::report::say;
use crate::tool::output;
use anyhow::{Context, Result, bail};
use rustix::process::geteuid;
use std::process::Command;

/// Building nacre-fs links this library.
pub const BUILD_PACKAGES: &[&str] = &["libcap-ng-dev"];

/// What tests on the machine itself use: interfaces, their rules, a container's programs.
pub const TEST_PACKAGES: &[&str] = &["iproute2", "nftables", "busybox-static"];

/// Making the emulated host's tree and packing it.
pub const TREE_PACKAGES: &[&str] = &["mmdebstrap", "erofs-utils"];

/// Installs the packages that are missing, as root; says which.
///
/// # Errors
/// A package is missing and the user is not root, or apt-get fails.
pub fn need(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !geteuid().is_root() {
        bail!("these Debian packages are missing; install them as root: apt-get install {list}");
    }
    say(&format!("installing Debian packages: {list}"));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        output(command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments))
    };
    apt(&["update"]).context("cannot update the package lists")?;
    let install = ["install", "--yes", "--no-install-recommends", "--no-upgrade"];
    apt(&[&install[..], &missing].concat()).with_context(|| format!("cannot install {list}"))?;
    Ok(())
}

fn installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    output(query.args(["-W", "-f", "${db:Status-Status}", package]))
        .is_ok_and(|status| status.trim() == "installed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_debian_has_needs_no_installation() {
        need(&["dpkg", "apt"]).unwrap();
    }
}
