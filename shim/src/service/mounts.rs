//! A container's root file system on the host: what containerd says is mounted on the bundle's
//! `rootfs`, and unmounted when the container is deleted, whoever does that.

use std::{
    ffi::{CString, NulError},
    fs, io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::types::mount::Mount;
use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount,
        mount_bind_recursive, mount_remount, move_mount, unmount,
    },
};

/// The kernel takes one page of options from mount(2).
const MAX_OPTIONS_BYTES: usize = 4095;
/// How many layers of mounts on one place are taken away.
const MOST_LAYERS: usize = 64;

/// Why a root file system can't be mounted.
#[derive(Debug, thiserror::Error)]
pub(super) enum MountError {
    #[error("can't make {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("can't mount {kind} {from} on {}", on.display())]
    Mount { kind: String, from: String, on: PathBuf, source: io::Error },
    #[error("a mount's options contain a zero byte")]
    Zero(#[from] NulError),
}

/// What the words among a mount's options that the kernel takes as flags say.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    is_bind: bool,
    data: Vec<String>,
}

fn parse(options: &[String]) -> Options {
    let mut parsed = Options { flags: MountFlags::empty(), is_bind: false, data: Vec::new() };
    for option in options {
        let flag = match option.as_str() {
            "bind" | "rbind" => {
                parsed.is_bind = true;
                continue;
            }
            "ro" => MountFlags::RDONLY,
            "nosuid" => MountFlags::NOSUID,
            "nodev" => MountFlags::NODEV,
            "noexec" => MountFlags::NOEXEC,
            "noatime" => MountFlags::NOATIME,
            "nodiratime" => MountFlags::NODIRATIME,
            "relatime" => MountFlags::RELATIME,
            "sync" => MountFlags::SYNCHRONOUS,
            // What is so anyway.
            "rw" | "defaults" | "suid" | "dev" | "exec" | "atime" | "async" | "" => continue,
            other => {
                parsed.data.push(other.to_owned());
                continue;
            }
        };
        parsed.flags |= flag;
    }
    parsed
}

/// Mounts all of `mounts`, one on the other, on `rootfs`; what was mounted is taken away if one
/// fails.
pub(super) fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<(), MountError> {
    if mounts.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(rootfs)
        .map_err(|source| MountError::Folder { path: rootfs.to_owned(), source })?;
    for one in mounts {
        if let Err(error) = mount_one(one, rootfs) {
            unmount_all(rootfs);
            return Err(error);
        }
    }
    Ok(())
}

fn mount_one(one: &Mount, rootfs: &Path) -> Result<(), MountError> {
    let target = match one.target.as_str() {
        "" => rootfs.to_owned(),
        // Below the root, whatever it says: no component may leave it.
        below => rootfs.join(below.trim_start_matches('/').replace("..", "_")),
    };
    let Options { flags, is_bind, data } = parse(&one.options);
    let source = one.source.as_str();
    let mounted = if is_bind || one.type_ == "bind" {
        mount_bind_recursive(source, &target).and_then(|()| {
            if flags.is_empty() {
                Ok(())
            } else {
                mount_remount(&target, flags | MountFlags::BIND, "")
            }
        })
    } else if data.iter().map(|option| option.len() + 1).sum::<usize>() > MAX_OPTIONS_BYTES {
        mount_by_parts(one, &target, flags, &data)
    } else {
        let data = CString::new(data.join(","))?;
        mount(source, &target, one.type_.as_str(), flags, data.as_c_str())
    };
    mounted.map_err(|error| MountError::Mount {
        kind: one.type_.clone(),
        from: one.source.clone(),
        on: target,
        source: error.into(),
    })
}

/// An overlay of many layers: each named alone, as their list is longer than mount(2) takes.
/// Linux 6.5 and later.
fn mount_by_parts(
    one: &Mount,
    target: &Path,
    flags: MountFlags,
    data: &[String],
) -> rustix::io::Result<()> {
    let file_system = fsopen(one.type_.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&file_system, "source", one.source.as_str())?;
    for option in data {
        match option.split_once('=') {
            Some(("lowerdir", layers)) => {
                for layer in layers.split(':') {
                    fsconfig_set_string(&file_system, "lowerdir+", layer)?;
                }
            }
            Some((key, value)) => fsconfig_set_string(&file_system, key, value)?,
            None => fsconfig_set_flag(&file_system, option.as_str())?,
        }
    }
    if flags.contains(MountFlags::RDONLY) {
        fsconfig_set_flag(&file_system, "ro")?;
    }
    fsconfig_create(&file_system)?;
    let attributes = [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
    ];
    let attributes = attributes
        .into_iter()
        .filter(|(flag, _)| flags.contains(*flag))
        .fold(MountAttrFlags::empty(), |all, (_, attribute)| all | attribute);
    let mounted = fsmount(&file_system, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Takes away whatever is mounted on `rootfs`. Nothing there is no failure.
pub(super) fn unmount_all(rootfs: &Path) {
    for _layer in 0..MOST_LAYERS {
        match unmount(rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted there any more, or there is no such folder.
            Err(Errno::INVAL | Errno::NOENT) => return,
            Err(error) => {
                log::warn!("{} can't be unmounted: {error}", rootfs.display());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn flags_are_told_from_what_the_file_system_reads() {
        let parsed = parse(&words(&["ro", "nosuid", "index=off", "lowerdir=/a:/b"]));
        assert_eq!(parsed.flags, MountFlags::RDONLY | MountFlags::NOSUID);
        assert_eq!(parsed.data, ["index=off", "lowerdir=/a:/b"]);
        assert!(!parsed.is_bind);
        let parsed = parse(&words(&["rbind", "rw"]));
        assert!(parsed.is_bind && parsed.flags.is_empty() && parsed.data.is_empty());
    }

    #[test]
    fn unmounting_nothing_is_no_failure() {
        let folder = tempfile::tempdir().unwrap();
        unmount_all(folder.path());
        unmount_all(&folder.path().join("absent"));
    }
}
