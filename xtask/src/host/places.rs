//! Where a path of this machine is in the emulated host.
//!
//! The machine's whole file system is at `/host` there. A path whose top folder is not part of a
//! Debian system is also put at its own place, so that commands run unchanged; one that would hide
//! the host's own files is not, and is named by its place beneath `/host`.

use std::path::{Component, Path, PathBuf};

/// Where the host has the machine's root.
const SHARE: &str = "/host";
/// Top folders of the host that nothing of the machine may hide.
const SYSTEM: &[&str] = &[
    "bin", "boot", "dev", "etc", "host", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin",
    "sys", "usr", "var",
];

/// A path's place in the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its name there.
    pub inside: PathBuf,
    /// What must be bound for that, if anything.
    pub bind: Option<PathBuf>,
}

/// The place of an absolute path without `..`.
pub fn place(path: &Path) -> Place {
    let mut parts = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name),
        _ => None,
    });
    let top = parts.next();
    let is_system = top.is_none_or(|top| SYSTEM.iter().any(|name| top == *name));
    // A whole top folder such as /tmp or /root is the host's own too.
    if is_system || parts.next().is_none() {
        let within = path.strip_prefix("/").unwrap_or(path);
        return Place { inside: Path::new(SHARE).join(within), bind: None };
    }
    Place { inside: path.to_path_buf(), bind: Some(path.to_path_buf()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inside(path: &str) -> String {
        place(Path::new(path)).inside.to_string_lossy().into_owned()
    }

    #[test]
    fn a_users_path_keeps_its_name() {
        assert_eq!(inside("/home/me/nacre"), "/home/me/nacre");
        assert_eq!(place(Path::new("/tmp/x")).bind, Some(PathBuf::from("/tmp/x")));
    }

    #[test]
    fn a_system_path_does_not_hide_the_hosts_own() {
        assert_eq!(inside("/etc/ssl"), "/host/etc/ssl");
        assert_eq!(inside("/"), "/host/");
        assert_eq!(inside("/tmp"), "/host/tmp");
        assert_eq!(place(Path::new("/usr/lib/x")).bind, None);
    }
}
