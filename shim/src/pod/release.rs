//! A container's file systems are to be let go of when it is gone, so that the host can take them
//! apart. The guest's kernel does that by forgetting their files; if it does not, or does not want
//! to, the `nacre-fs` that has them open is replaced: a successor opens only what the guest asks for.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use tokio::time::{Instant, sleep};

use crate::backends::Roster;

/// How long the guest may take to forget.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(2);
/// How often it is looked whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The mounts below one folder of the share, as the process that serves it has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mounts {
    pid: i32,
    ids: BTreeSet<u64>,
}

impl Mounts {
    /// Those of `folder`, which has no blanks; the process's root is the share.
    pub(super) fn of(roster: &Roster, share: &str, folder: &str) -> Option<Self> {
        let pid = roster.find(share)?.view().process.pid;
        let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
        Some(Self { pid, ids: below(&text, folder) })
    }

    fn are_open(&self) -> bool {
        let Ok(listed) = fs::read_dir(format!("/proc/{}/fdinfo", self.pid)) else { return false };
        let mut open = listed.flatten().filter_map(|entry| mount_of(&entry.path()));
        open.any(|mount| self.ids.contains(&mount))
    }
}

/// Waits until nothing of `mounts`, which were taken off, is open any more, and sees to it.
pub(super) async fn see_to(roster: Roster, share: &str, mounts: Mounts) {
    let end = Instant::now() + FORGOTTEN_WITHIN;
    while mounts.are_open() {
        if Instant::now() < end {
            sleep(LOOK_EVERY).await;
            continue;
        }
        let Some(handle) = roster.find(share) else { return };
        if handle.view().process.pid != mounts.pid {
            return;
        }
        log::debug!("the guest keeps files of a container that is gone: `{share}` is replaced");
        match handle.replace(None).await {
            Ok(_unserved) => {}
            Err(error) => log::warn!("file systems of a container stay in use: {error}"),
        }
        return;
    }
}

/// The ids (the first field of each line, proc(5)) of the mounts at and below `/folder`.
fn below(mountinfo: &str, folder: &str) -> BTreeSet<u64> {
    let root = Path::new("/").join(folder);
    let fields = mountinfo.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter_map(|fields| {
            let [id, _parent, _device, _root, point, ..] = fields[..] else { return None };
            Path::new(point).starts_with(&root).then(|| id.parse().ok()).flatten()
        })
        .collect()
}

fn mount_of(fdinfo: &Path) -> Option<u64> {
    let text = fs::read_to_string(fdinfo).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn a_container_s_mounts_are_told_from_others() {
        let text = "30 1 0:26 / / rw - tmpfs x rw\n\
                    31 30 0:27 / /web/rootfs rw - overlay x rw\n\
                    32 31 0:28 / /web/volumes/0 rw - ext4 x rw\n\
                    33 30 0:29 / /web~2/rootfs rw - overlay x rw\n\
                    nonsense\n";
        assert_eq!(below(text, "web"), BTreeSet::from([31, 32]));
        assert_eq!(below(text, "web~2"), BTreeSet::from([33]));
    }

    #[test]
    fn what_a_process_has_open_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("file")).unwrap();
        let fd = file.as_raw_fd();
        let id = mount_of(Path::new(&format!("/proc/self/fdinfo/{fd}"))).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(Mounts { pid, ids: BTreeSet::from([id]) }.are_open());
        assert!(!Mounts { pid, ids: BTreeSet::from([u64::MAX]) }.are_open());
    }
}
