//! Kernel settings of the guest as a whole: names of /proc/sys, checked.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

const SETTINGS: &str = "/proc/sys";
const SETTINGS_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 256;
const VALUE_BYTES_MAX: usize = 4096;

/// Why a setting can't be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SysctlError {
    /// No name, or no value.
    #[error("{what} {value:?}")]
    Invalid {
        /// What.
        what: &'static str,
        /// As given.
        value: String,
    },
    /// Too many.
    #[error("{0} settings of the kernel: at most {SETTINGS_MAX} are allowed")]
    TooMany(usize),
    /// The kernel refuses.
    #[error("can't set {0}")]
    Set(String, #[source] io::Error),
}

/// Settings, checked, in the order of their names.
#[derive(Debug)]
pub(crate) struct Sysctls(Vec<(String, PathBuf, String)>);

impl Sysctls {
    /// Checks what the host gave.
    pub(crate) fn parse(given: &HashMap<String, String>) -> Result<Self, SysctlError> {
        if given.len() > SETTINGS_MAX {
            return Err(SysctlError::TooMany(given.len()));
        }
        let setting = |(name, value): (&String, &String)| {
            if value.len() > VALUE_BYTES_MAX || value.contains(['\0', '\n']) {
                let what = "no value of the kernel's settings:";
                return Err(SysctlError::Invalid { what, value: value.clone() });
            }
            Ok((name.clone(), path(name)?, value.clone()))
        };
        let mut settings = given.iter().map(setting).collect::<Result<Vec<_>, _>>()?;
        settings.sort();
        Ok(Self(settings))
    }

    /// Those that can be made at once, and those that are about an interface of some name, which has
    /// to be there.
    pub(crate) fn split(self) -> (Self, Self) {
        let is_late = |(_name, path, _value): &(String, PathBuf, String)| is_of_interface(path);
        let (late, early) = self.0.into_iter().partition(is_late);
        (Self(early), Self(late))
    }

    /// Makes them.
    pub(crate) fn apply(&self) -> Result<(), SysctlError> {
        for (name, path, value) in &self.0 {
            fs::write(path, value).map_err(|source| SysctlError::Set(name.clone(), source))?;
        }
        Ok(())
    }
}

/// Whether a setting is below a folder with an interface's name.
fn is_of_interface(path: &Path) -> bool {
    let parts: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    parts
        .windows(2)
        .any(|pair| matches!(pair[0], "conf" | "neigh") && !matches!(pair[1], "all" | "default"))
}

/// As sysctl(8) reads names: the first separator says whether it is dots or slashes that separate.
fn path(name: &str) -> Result<PathBuf, SysctlError> {
    let separator =
        name.find(['.', '/']).map_or('.', |at| if name[at..].starts_with('.') { '.' } else { '/' });
    let known = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'_' | b'-' | b'.' | b'/' | b'*' | b'@' | b':')
    };
    let parts: Vec<String> = name
        .split(separator)
        // With dots as separators a slash stands for a dot, as in the name of an interface.
        .map(|part| if separator == '.' { part.replace('/', ".") } else { part.to_owned() })
        .collect();
    let is_path =
        parts.len() > 1 && parts.iter().all(|part| !part.is_empty() && part != "." && part != "..");
    if name.len() <= NAME_BYTES_MAX && name.bytes().all(known) && is_path {
        Ok(parts.iter().fold(Path::new(SETTINGS).to_path_buf(), |path, part| path.join(part)))
    } else {
        Err(SysctlError::Invalid {
            what: "no name of a setting of the kernel:",
            value: name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_sysctl_reads_them() {
        for (name, expected) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("net/ipv4/conf/eth0.100/forwarding", "/proc/sys/net/ipv4/conf/eth0.100/forwarding"),
            ("net.ipv4.conf.eth0/100.forwarding", "/proc/sys/net/ipv4/conf/eth0.100/forwarding"),
        ] {
            assert_eq!(path(name).unwrap(), Path::new(expected), "{name}");
        }
    }

    #[test]
    fn settings_of_interfaces_wait_for_them() {
        let given = ["net.ipv4.conf.eth0.x", "net.ipv4.conf.all.x", "net.ipv6.neigh.lan.y", "a.b"];
        let given = given.map(|name| (name.to_owned(), "1".to_owned())).into();
        let (early, late) = Sysctls::parse(&given).unwrap().split();
        let names = |settings: Sysctls| settings.0.into_iter().map(|(name, ..)| name);
        assert_eq!(names(early).collect::<Vec<_>>(), ["a.b", "net.ipv4.conf.all.x"]);
        assert_eq!(names(late).count(), 2);
    }

    #[test]
    fn nothing_outside_can_be_named() {
        for name in [
            "",
            "net",
            "..",
            "../x",
            "net/../../x",
            "net.//..x",
            "/etc/passwd",
            "a..b",
            "a b.c",
            "net/.",
        ] {
            assert!(path(name).is_err(), "{name:?}");
        }
        let given = |value: &str| HashMap::from([("a.b".to_owned(), value.to_owned())]);
        assert!(Sysctls::parse(&given("1\n2")).is_err());
        assert!(Sysctls::parse(&given("1")).is_ok());
    }
}
