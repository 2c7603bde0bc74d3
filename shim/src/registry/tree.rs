//! A sandbox's folder and what is mounted in it, which is somebody else's: a container's root file
//! system, its volumes. Removing the folder must not remove those.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::mount::{UnmountFlags, unmount};

/// Removes the folder and what is in it, once nothing is mounted in it any more.
///
/// # Errors
///
/// Fails, with everything that is mounted left alone, if something can't be unmounted.
pub(super) fn remove(folder: &Path) -> io::Result<()> {
    detach(folder)?;
    fs::remove_dir_all(folder)
}

/// Unmounts all that is mounted in the folder. What is still in use stays with whoever uses it.
///
/// # Errors
///
/// Fails if something can't be unmounted.
pub(crate) fn detach(folder: &Path) -> io::Result<()> {
    // What is mounted last comes first: it may cover something else.
    for mount in mounts_below(folder)?.iter().rev() {
        match unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // It went with the one that it was mounted in.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match mounts_below(folder)?.first() {
        None => Ok(()),
        Some(left) => Err(io::Error::other(format!("{} is still mounted", left.display()))),
    }
}

fn mounts_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = match folder.canonicalize() {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mounts = fs::read("/proc/self/mountinfo")?;
    let points = mounts.split(|byte| *byte == b'\n').filter_map(mount_point);
    Ok(points.filter(|point| point.starts_with(&folder)).collect())
}

/// The fifth field of a line of mountinfo (proc(5)), in which blanks, tabs, newlines and backslashes
/// are octal.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut point = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, more @ ..] = rest {
        let octal = |digits: &[u8]| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok();
        match (first, more.get(..3).and_then(octal)) {
            (b'\\', Some(byte)) => {
                point.push(byte);
                rest = &more[3..];
            }
            _ => {
                point.push(*first);
                rest = more;
            }
        }
    }
    Some(OsStr::from_bytes(&point).into())
}

#[cfg(test)]
mod tests {
    use rustix::mount::mount_bind;

    use super::*;

    #[test]
    fn a_mount_point_is_read_with_its_odd_letters() {
        let line = br"36 35 98:0 /mnt1 /mnt\0402/a\134b rw,noatime master:1 - ext3 /dev/root rw";
        assert_eq!(mount_point(line).unwrap(), Path::new(r"/mnt 2/a\b"));
        assert_eq!(mount_point(b""), None);
    }

    #[test]
    fn what_is_mounted_in_a_folder_outlives_the_folder() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root mounts");
            return;
        }
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("precious"), "x").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let sandbox = folder.path().join("sandbox");
        let point = sandbox.join("a b");
        fs::create_dir_all(&point).unwrap();
        if let Err(error) = mount_bind(outside.path(), &point) {
            println!("SKIPPED: this place does not let root mount: {error}");
            return;
        }
        mount_bind(outside.path(), &point).unwrap();
        remove(&sandbox).unwrap();
        assert!(!sandbox.exists() && outside.path().join("precious").exists());
    }
}
