//! What is mounted in a share, and that it can be taken out again while it is in use.

use std::os::unix::fs::PermissionsExt;

use rustix::process::geteuid;

use super::*;

/// What a test works in; unmounted at its end.
struct Place {
    folder: tempfile::TempDir,
    share: Share,
}

impl Place {
    /// None where nothing can be mounted.
    fn make() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let made = Share::make(folder.path().join("shared"));
        match made {
            Ok(share) => Some(Self { folder, share }),
            Err(error) if !geteuid().is_root() => {
                println!("SKIPPED: only root mounts: {error}");
                None
            }
            Err(error) => panic!("{}", crate::error_chain(&error)),
        }
    }

    /// A folder of the host's with a file in it.
    fn host(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), name).unwrap();
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        unmount(&self.share.folder, UnmountFlags::DETACH).unwrap();
    }
}

fn bind(from: &Path, read_only: bool) -> Bind {
    let is_folder = from.is_dir();
    Bind { from: from.to_owned(), is_folder, is_whole: true, read_only, follows: false }
}

#[test]
fn a_container_s_root_folders_and_files_are_there_as_long_as_it_is() {
    let Some(place) = Place::make() else { return };
    let (rootfs, data) = (place.host("rootfs"), place.host("data"));
    let folder = place.share.reserve("web");
    assert_eq!(folder.in_guest(), "/run/nacre/pod/web");
    let binds = [bind(&data, false), bind(&data.join("file"), true)];
    place.share.fill(&folder, &rootfs, &binds).unwrap();
    let seen = place.share.folder.join("web");
    assert_eq!(fs::read(seen.join("rootfs/file")).unwrap(), b"rootfs");
    fs::write(seen.join("volumes/0/new"), "x").unwrap();
    assert_eq!(fs::read(data.join("new")).unwrap(), b"x");
    assert_eq!(fs::read(seen.join("volumes/1")).unwrap(), b"data");
    let error = fs::write(seen.join("volumes/1"), "x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    // Nothing in it is a program here.
    let program = rootfs.join("program");
    fs::write(&program, "#!/bin/true\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(std::process::Command::new(seen.join("rootfs/program")).status().is_err());

    // In use, as a nacre-fs may have it: that holds nothing up.
    let _open = File::open(seen.join("rootfs/file")).unwrap();
    place.share.empty(&folder);
    assert!(!seen.exists());
    assert!(rootfs.join("file").exists() && data.join("file").exists());
    assert_eq!(place.share.reserve("web").in_guest(), "/run/nacre/pod/web~2");
}

#[test]
fn what_can_not_be_mounted_whole_is_not_mounted_at_all() {
    let Some(place) = Place::make() else { return };
    let rootfs = place.host("rootfs");
    let folder = place.share.reserve("web");
    let binds = [bind(&rootfs, false), bind(Path::new("/nowhere/at/all"), false)];
    let error = place.share.fill(&folder, &rootfs, &binds).unwrap_err();
    assert_eq!(error.to_string(), "/nowhere/at/all can't be shared with the guest");
    assert!(!place.share.folder.join("web").exists());
    assert!(rootfs.join("file").exists());
}

#[test]
fn what_is_at_a_path_is_told() {
    assert_eq!(look(Path::new("/")).unwrap(), Kind::Folder);
    assert_eq!(look(Path::new("/proc/self/status")).unwrap(), Kind::File);
    assert_eq!(look(Path::new("/nowhere/at/all")).unwrap_err().kind(), io::ErrorKind::NotFound);
}
