//! The packages that must be installed on the machine itself: few, and never a kernel.

use crate::report::say;
use crate::tool::output;
use anyhow::{Context, Error, Result, anyhow, bail};
use rustix::process::geteuid;
use std::process::Command;

/// Building nacre-fs links this library.
pub const BUILD_PACKAGES: &[&str] = &["libcap-ng-dev"];

/// A sandbox's network on the machine itself.
pub const NETWORK_PACKAGES: &[&str] = &["iproute2", "nftables"];

/// What tests on the machine itself use: interfaces, their rules, a container's programs.
pub const TEST_PACKAGES: &[&str] = &["iproute2", "nftables", "busybox-static"];

/// Making the emulated host's tree and packing it.
pub const TREE_PACKAGES: &[&str] = &["mmdebstrap", "erofs-utils"];

/// Stops a user who is not root before anything takes its time: sandboxes need taps and mount
/// namespaces. Names the packages that are missing as well.
///
/// # Errors
/// The user is not root.
pub fn need_root(packages: &[&str]) -> Result<()> {
    if geteuid().is_root() { Ok(()) } else { Err(refusal(&missing(packages))) }
}

fn refusal(missing: &[&str]) -> Error {
    let list = missing.join(" ");
    if missing.is_empty() {
        return anyhow!(
            "sandboxes need root, for taps and mount namespaces; no Debian package is missing"
        );
    }
    anyhow!(
        "sandboxes need root, for taps and mount namespaces; it also installs the Debian packages \
         that are missing: {list}"
    )
}

fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages.iter().copied().filter(|name| !installed(name)).collect()
}

/// Installs the packages that are missing, as root; says which.
///
/// # Errors
/// A package is missing and the user is not root, or apt-get fails.
pub fn need(packages: &[&str]) -> Result<()> {
    let missing = missing(packages);
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
    fn who_is_not_root_is_told_what_is_missing() {
        let told = refusal(&missing(&["dpkg", "no-such-package"])).to_string();
        assert!(told.contains("need root") && told.ends_with("missing: no-such-package"), "{told}");
        assert!(refusal(&missing(&["dpkg"])).to_string().ends_with("no Debian package is missing"));
    }

    #[test]
    fn what_every_debian_has_needs_no_installation() {
        need(&["dpkg", "apt"]).unwrap();
    }
}
