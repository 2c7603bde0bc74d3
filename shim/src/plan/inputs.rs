//! What a plan needs to know of the host, and whether the files that it names can be used.

use std::{
    fs::{self, File},
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use crate::{image::beneath::Beneath, network, plan::SandboxConfig, size::ByteSize};

/// The largest account file that is read, in bytes.
const MAX_ACCOUNTS_BYTES: u64 = 1 << 20;

/// What a plan takes from the host.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// Memory and swap.
    pub memory_and_swap: ByteSize,
    /// The name servers that a guest can reach.
    pub nameservers: Vec<Ipv4Addr>,
    /// /etc/passwd of the container's root file system, or nothing.
    pub passwd: String,
    /// /etc/group of the container's root file system, or nothing.
    pub group: String,
}

/// A file that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// It can't be opened.
    #[error("{what} {}", path.display())]
    Unusable {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It has no content.
    #[error("{what} {}: the file is empty", path.display())]
    Empty {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// It is not a file.
    #[error("{what} {}: not a file", path.display())]
    NotFile {
        /// What it is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// It is not a folder.
    #[error("{what} {}: not a folder", path.display())]
    NotFolder {
        /// What it is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
}

impl HostFacts {
    /// Asks the host, and the container's root file system for its accounts.
    ///
    /// # Errors
    ///
    /// Fails if /proc is not there or the root file system is no folder.
    pub fn gather(rootfs: &Path) -> Result<Self, InputError> {
        let meminfo = Path::new("/proc/meminfo");
        let text = fs::read_to_string(meminfo).map_err(|source| InputError::Unusable {
            what: "the host's memory",
            path: meminfo.to_owned(),
            source,
        })?;
        let root = Beneath::open(rootfs).map_err(|source| InputError::Unusable {
            what: "root file system",
            path: rootfs.to_owned(),
            source,
        })?;
        let accounts = |path: &str| {
            let bytes = root.read(Path::new(path), MAX_ACCOUNTS_BYTES);
            let bytes = bytes.inspect_err(|error| log::debug!("the container's {path}: {error}"));
            String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
        };
        Ok(Self {
            memory_and_swap: memory_and_swap(&text),
            nameservers: network::nameservers(),
            passwd: accounts("etc/passwd"),
            group: accounts("etc/group"),
        })
    }
}

fn memory_and_swap(meminfo: &str) -> ByteSize {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let kib = field("MemTotal:").unwrap_or_default() + field("SwapTotal:").unwrap_or_default();
    ByteSize(kib.saturating_mul(1024))
}

/// Checks that every file and folder of `config` can be used, before anything is started.
///
/// # Errors
///
/// Fails with the first that can't.
pub fn check(config: &SandboxConfig) -> Result<(), InputError> {
    content("kernel", &config.kernel)?;
    content("initramfs", &config.initramfs)?;
    folder("root file system", &config.rootfs)?;
    for volume in &config.volumes {
        folder("volume", &volume.host)?;
    }
    for disk in &config.disks {
        let opened = if disk.read_only {
            File::open(&disk.path)
        } else {
            File::options().read(true).write(true).open(&disk.path)
        };
        opened.map_err(|source| InputError::Unusable {
            what: "disk",
            path: disk.path.clone(),
            source,
        })?;
    }
    Ok(())
}

fn content(what: &'static str, path: &Path) -> Result<(), InputError> {
    let metadata = File::open(path)
        .and_then(|file| file.metadata())
        .map_err(|source| InputError::Unusable { what, path: path.to_owned(), source })?;
    if !metadata.is_file() {
        return Err(InputError::NotFile { what, path: path.to_owned() });
    }
    if metadata.len() == 0 {
        return Err(InputError::Empty { what, path: path.to_owned() });
    }
    Ok(())
}

fn folder(what: &'static str, path: &Path) -> Result<(), InputError> {
    let metadata = fs::metadata(path).map_err(|source| InputError::Unusable {
        what,
        path: path.to_owned(),
        source,
    })?;
    if metadata.is_dir() {
        Ok(())
    } else {
        Err(InputError::NotFolder { what, path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_swap_are_added() {
        let text = "MemTotal:        2048 kB\nMemFree: 1 kB\nSwapTotal:       1024 kB\n";
        assert_eq!(memory_and_swap(text), ByteSize(3 << 20));
    }

    #[test]
    fn a_file_that_is_missing_empty_or_none_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernel");
        assert!(matches!(content("kernel", &file), Err(InputError::Unusable { .. })));
        fs::write(&file, "").unwrap();
        assert!(matches!(content("kernel", &file), Err(InputError::Empty { .. })));
        assert!(matches!(content("kernel", folder.path()), Err(InputError::NotFile { .. })));
        fs::write(&file, "x").unwrap();
        content("kernel", &file).unwrap();
        assert!(matches!(super::folder("volume", &file), Err(InputError::NotFolder { .. })));
    }
}
