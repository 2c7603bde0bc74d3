//! Who has a disk in use.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use rustix::fs::makedev;

/// Somebody who has a disk in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum User {
    /// The kernel: it is mounted, or part of another device.
    Kernel,
    /// A process, by its number in the guest and its name.
    Process(u32, String),
}

/// One of those who have the disk `name`, number `number`, in use.
pub(super) fn of_disk(name: &str, number: (u32, u32)) -> io::Result<Option<User>> {
    if let Some(process) = holder(Path::new("/proc"), makedev(number.0, number.1)) {
        return Ok(Some(process));
    }
    // Only one can open it so, and nobody who has it mounted lets another do it.
    let claim = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
        .open(Path::new("/dev").join(name));
    match claim {
        Ok(_claimed) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(Some(User::Kernel)),
        // The device has nothing in it to be opened any more.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A process that has a node of the disk open.
fn holder(processes: &Path, number: u64) -> Option<User> {
    for process in fs::read_dir(processes).ok()?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse() else { continue };
        let files = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        // What is closed while it is looked at is not in use.
        let is_open = files
            .filter_map(|file| fs::metadata(file.path()).ok())
            .any(|file| file.file_type().is_block_device() && file.rdev() == number);
        if is_open {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(User::Process(pid, name.trim().to_owned()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_a_disk_that_does_not_exist() {
        assert_eq!(holder(Path::new("/proc"), makedev(4095, 77)), None);
        assert_eq!(holder(Path::new("/nonexistent"), 0), None);
    }
}
